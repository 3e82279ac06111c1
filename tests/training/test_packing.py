"""Records that share rows: the losses and gradients of rows of their own."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fedalt
from fedalt.config.settings import config_from_dict
from fedalt.data import Chat, Record, collate, encode, pack
from fedalt.data.packing import shelves
from fedalt.evaluation import TextTask
from fedalt.model import inject, load_base
from fedalt.training import answer_loss, check_packing
from fedalt.training.micro import largest_gradient
from tests.families import write_family

FAMILIES = ("chatml", "llama3", "gemma", "mistral", "phi3", "qwen3")
CPU = torch.device("cpu")
RECORDS = [Record("say " * i, "yes " * (1 + i % 3)) for i in (1, 40, 2, 6, 1, 3, 2)]
RECORDS.append(Chat((("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))))


@pytest.fixture(params=FAMILIES)
def prepared(request, tiny_base, tmp_path):
    """A model with adapters that say something, and the task of a run on it."""
    base = write_family(request.param, tiny_base, tmp_path / "base")
    settings = {"model": {"path": str(base)}, "train": {"packing": True}}
    config = config_from_dict(settings)
    model, tokenizer = load_base(config.model)
    inject(model, rank=2, dropout=0.0, target_modules="all-linear")
    for name, tensor in model.named_parameters():
        if name.endswith((".b", "mixer")):
            torch.nn.init.normal_(tensor, std=0.05)
    return model, TextTask(config, tokenizer), encode(RECORDS, tokenizer, config.data)


def gradients(model, loss, batch, count, size):
    model.zero_grad(set_to_none=True)
    total, _ = largest_gradient(model, batch, loss, count, size)
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return total.double(), found


@pytest.mark.parametrize("size", [None, 3])
def test_loss_and_gradient_are_those_of_unpacked_rows(prepared, size):
    """Within what rounding does to the unpacked ones: fp32 against fp64."""
    model, task, examples = prepared
    check_packing(model)
    pad = task.tool.pad_token_id

    def unpacked(model, batch):
        return answer_loss(model, collate(batch, pad, CPU))

    assert pack(examples, pad, CPU).input_ids.shape[0] < len(examples)
    packed = gradients(model, task.loss, examples, task.count, size)
    plain = gradients(model, unpacked, examples, task.count, None)
    exact = gradients(model.double(), unpacked, examples, task.count, 1)  # without padding
    assert packed[1].keys() == exact[1].keys()
    names = packed[1].keys()
    scale = max(exact[1][name].abs().max() for name in names)
    for found in (packed, plain):
        assert (found[0] - exact[0]).abs() < 1e-6 * exact[0]
        assert max((found[1][n] - exact[1][n]).abs().max() for n in names) < 2e-5 * scale


def test_the_mask_is_needed(prepared):
    """Rows that go on counting positions, so that texts see each other, have another loss."""
    model, task, examples = prepared
    batch = pack(examples, task.tool.pad_token_id, CPU)
    onward = torch.arange(batch.input_ids.shape[1]).expand_as(batch.position_ids)
    other = answer_loss(model, type(batch)(batch.input_ids, None, onward, batch.labels))
    assert (other - answer_loss(model, batch)).abs() > 1e-3


@pytest.mark.parametrize("kind", ["bloom", "gpt2"])
def test_models_that_cannot_keep_texts_apart_are_refused(kind):
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "vocab_size": 32, "initializer_range": 0.3}
    width = {"hidden_size": 16} if kind == "bloom" else {"n_embd": 16, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **width)).eval()
    if kind == "gpt2":
        return check_packing(model)
    with pytest.raises(fedalt.InputError, match=r"train\.packing: in BloomForCausalLM records"):
        check_packing(model)


def test_shelves_waste_little_and_lose_nothing():
    rows = shelves([5, 9, 4, 9, 1, 3, 2])
    assert rows == [[1], [3], [0, 2], [5, 6, 4]]


def test_a_packed_run_trains_as_an_unpacked_one(tiny_config):
    settings = tiny_config.to_dict()
    settings["lora"]["dropout"] = 0.0
    losses = []
    for packing in (False, True):
        settings["train"]["packing"] = packing
        settings["out"] = f"{tiny_config.out}-{packing}"
        results = fedalt.Federation(config_from_dict(settings)).run().results
        losses.append([client["last"]["loss"] for client in results["clients"].values()])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-3)

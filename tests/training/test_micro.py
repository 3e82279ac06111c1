"""Micro-batches: the whole batch's gradient in parts, found by halving where memory runs out."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedalt
from fedalt.config.schema import BUILTIN_VIT, ModelConfig
from fedalt.data.tokens import collate
from fedalt.evaluation.tasks import TextTask
from fedalt.model.states import adapter_state, load_adapter_state, set_trainable
from fedalt.model.vision import load_image_base
from fedalt.training.client import train_client
from fedalt.training.loss import answer_loss, class_loss
from fedalt.training.micro import accumulate, out_of_memory
from tests.data.test_images import DIGIT_NAMES as NAMES
from tests.kernels.budget import assert_within_budget
from tests.run.test_run import cut_short, events_of, quick, record_of, run
from tests.training.memory_cases import WIDEST, same_bits, some_examples, stirred
from tests.training.test_client import text_client

TRAINS = [("individual", "mixer")]


def text_loss(model, batch):
    return answer_loss(model, collate(batch, 0, torch.device("cpu")))


def answer_tokens(batch):
    return sum(len(example.answer) for example in batch)


def added_up(model, batch, loss, count, size):
    """The loss and the gradients that ``accumulate`` makes."""
    set_trainable(model, ("individual", "mixer", "head"))
    model.train()
    model.zero_grad()
    value = accumulate(model, batch, loss, count, size)
    return {"loss": value} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_no_worse_than_whole(model, batch, loss, count, size, length):
    """In parts, fp32 loses what the whole batch loses in the worst of its orders, at most.

    All tensors are one vector, each in units of its own RMS: of a few numbers alone the error's
    maximum is luck.
    """
    wide = copy.deepcopy(model).double()
    exact = added_up(wide, batch, loss, count, len(batch))
    units = {name: tensor.square().mean().sqrt() for name, tensor in exact.items()}

    def vector(grads):
        flat = torch.cat([(grads[name].double() / units[name]).flatten() for name in units])
        return flat if grads is exact else flat.float()

    truth, worst = vector(exact), None
    for first in range(len(batch)):
        order = batch[first:] + batch[:first]
        whole = vector(added_up(copy.deepcopy(model), order, loss, count, len(batch)))
        worst = whole if worst is None else worst
        worst = torch.where((whole - truth).abs() > (worst - truth).abs(), whole, worst)
    got = vector(added_up(copy.deepcopy(model), batch, loss, count, size))
    assert_within_budget({"all": got}, {"all": worst}, {"all": truth}, length)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_parts_of_a_batch_lose_no_more_than_the_whole_does(tiny_config, size):
    """Answers of 2 to 12 tokens: a mean of the parts' means would be far off."""
    config = replace(tiny_config, lora=replace(tiny_config.lora, dropout=0.0))
    model, batch = stirred(text_client(config)[0]), some_examples(8)
    assert_no_worse_than_whole(model, batch, text_loss, answer_tokens, size, WIDEST)
    right, careless = (
        added_up(copy.deepcopy(model), batch, text_loss, count, size)["loss"]
        for count in (answer_tokens, len)
    )
    assert (careless - right).abs() > 1e-3


def test_parts_of_a_batch_of_images_lose_no_more_than_the_whole_does():
    model = load_image_base(ModelConfig(BUILTIN_VIT), NAMES)[0]
    fedalt.inject(model, rank=2, alpha=4, dropout=0.0, target_modules=("all-linear",))
    stirred(model)
    size, channels = model.config.image_size, model.config.num_channels
    torch.manual_seed(0)
    batch = [(torch.randn(channels, size, size), i % 10) for i in range(5)]

    def loss(model, batch):
        dtype = next(model.parameters()).dtype
        pixels = torch.stack([image for image, _ in batch]).to(dtype)
        return class_loss(model, pixels, [label for _, label in batch])

    shape = model.config
    tokens = len(batch) * (1 + (size // shape.patch_size) ** 2)
    # Of the sums that a gradient goes through one after another.
    sums = shape.num_hidden_layers * (shape.intermediate_size + shape.hidden_size + tokens)
    assert_no_worse_than_whole(model, batch, loss, len, 2, sums)


FULL = {
    "torch.OutOfMemoryError": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "MemoryError": MemoryError(),
    "RuntimeError": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"),
}


class Refusing(torch.autograd.Function):
    """The identity, with a backward that raises."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        raise ctx.error


def narrow(model, rows, error, where):
    """Make the second block raise in training where more rows than ``rows`` go through it."""
    hits = []

    def hook(module, inputs):
        x = inputs[0]
        if not module.training or x.shape[0] <= rows:
            return None
        hits.append(x.shape[0])
        if where == "forward":
            raise error
        return (Refusing.apply(x, error), *inputs[1:])

    model.model.layers[1].register_forward_pre_hook(hook)
    return hits


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", FULL)
def test_where_memory_runs_out_the_step_is_run_again_in_halves(tiny_config, error, where):
    """It ends in the bits of a training that began with what fits: dropout included."""
    model, task, examples = text_client(tiny_config)
    start, config = adapter_state(model), replace(tiny_config.train, batch_size=7, max_steps=4)

    def trained(config):
        load_adapter_state(model, start)
        result = train_client(
            model, examples, config, task.loss, trains=TRAINS, seed=7, count=task.count
        )
        return result, adapter_state(model)

    fitted = trained(replace(config, micro_batch=2))
    hits = narrow(model, 2, FULL[error], where)
    found = trained(config)
    assert hits == [7, 4]  # then 2, which holds for all that follows
    assert found[0] == fitted[0]
    assert found[0].micro_batch == 2
    assert same_bits(found[1], fitted[1])


@pytest.mark.parametrize(
    ("rows", "error"), [(0, FULL["torch.OutOfMemoryError"]), (2, RuntimeError("shapes differ"))]
)
def test_what_halving_cannot_cure_is_raised(tiny_config, rows, error):
    model, task, examples = text_client(tiny_config)
    hits = narrow(model, rows, error, "forward")
    with pytest.raises(type(error), match=str(error)):
        train_client(model, examples, tiny_config.train, task.loss, trains=TRAINS, seed=7)
    assert hits == ([4, 2, 1] if rows == 0 else [4])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_errors_of_memory_are_told_from_others():
    assert all(map(out_of_memory, FULL.values()))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert not out_of_memory(RuntimeError("CUDA error: device-side assert"))


def test_a_run_keeps_what_fits_and_a_resume_begins_with_it(tiny_config, tmp_path, monkeypatch):
    """Ctrl-C in the second of two rounds; memory ran out once, at the very first step."""
    hits = []
    loss = TextTask.loss

    def narrow_loss(self, model, batch):
        if model.training and len(batch) > 1:
            hits.append(len(batch))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(self, model, batch)

    monkeypatch.setattr(TextTask, "loss", narrow_loss)
    config = quick(tiny_config)  # batches of two
    uncut = replace(config, out=str(tmp_path / "uncut"))
    saved = run(uncut)
    assert hits == [2]
    assert saved.record["micro_batch"] == 1
    assert {event["micro_batch"] for event in events_of(uncut, "train")} == {1}
    results = json.loads(Path(uncut.out, "results.json").read_text())
    assert results["clients"]["bob"]["micro_batch"] == 1
    assert "examples run at once" in Path(uncut.out, "report", "report.html").read_text()

    cut_short(config)
    hits.clear()
    fedalt.Federation(config).run(resume=True)
    assert hits == []
    assert record_of(Path(config.out)) == record_of(Path(uncut.out))


def test_a_run_that_holds_every_batch_says_nothing_of_it(tiny_config):
    config = quick(tiny_config, rounds=1)
    saved = run(replace(config, train=replace(config.train, micro_batch=9)))
    assert not any("micro_batch" in event for event in events_of(config, "train"))
    results = json.loads(Path(config.out, "results.json").read_text())
    assert "micro_batch" not in results["clients"]["ann"]
    plain = run(replace(config, out=config.out + "-plain"))
    assert plain.record["micro_batch"] is None
    assert same_bits(saved.used("ann").read(), plain.used("ann").read())

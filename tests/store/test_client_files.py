"""Clients in folders, and in the checkpoints of other people's trainers."""

import pytest
import torch

import fedalt
from fedalt.config import ModelConfig
from fedalt.model import adapter_state, load_base

IDS = [[1, *range(5 + i, 17 + i), 2] for i in range(8)]


def model_of(base, seed=0, rank=2):
    model, tokenizer = load_base(ModelConfig(path=str(base)))
    fedalt.inject(model, rank=rank, dropout=0.3, target_modules="all-linear", seed=seed)
    return model, tokenizer


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_a_client_is_saved_without_its_base_and_read_back(tiny_base, tmp_path):
    model, _ = model_of(tiny_base)
    path = fedalt.save_client(model, tmp_path / "ann")
    state = adapter_state(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert size <= path.stat().st_size < size + 200 * len(state) + 200
    other, _ = model_of(tiny_base, seed=1)
    assert not same(adapter_state(other), state)
    fedalt.load_client_state(other, tmp_path / "ann")
    assert same(adapter_state(other), state)


def test_what_is_no_client_or_does_not_fit_is_told_in_one_line(tiny_base, tmp_path):
    model, _ = model_of(tiny_base)
    with pytest.raises(fedalt.InputError, match="not a readable safetensors file"):
        fedalt.load_client_state(model, tmp_path)
    fedalt.save_client(model_of(tiny_base, rank=3)[0], tmp_path)
    with pytest.raises(fedalt.InputError, match=r"model\.safetensors: .* has shape"):
        fedalt.load_client_state(model, tmp_path)
    bare, _ = load_base(ModelConfig(path=str(tiny_base)))
    with pytest.raises(fedalt.InputError, match="has no adapters; inject them first"):
        fedalt.save_client(bare, tmp_path)


def trainer_of(kind, base, folder):
    """A trainer of eight examples and four steps, with a checkpoint at the second."""
    model, tokenizer = model_of(base)
    given = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
    }
    callbacks = [fedalt.client_checkpoints()]
    if kind == "Trainer":
        pytest.importorskip("accelerate", reason="a Trainer wants it: fedalt[trainer]")
        from transformers import Trainer, TrainingArguments

        data = [{"input_ids": ids, "labels": ids} for ids in IDS]
        arguments = TrainingArguments(str(folder), **given)
        return Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trl = pytest.importorskip("trl", reason="SFTTrainer is its: pip install 'fedalt[trainer]'")
    datasets = pytest.importorskip("datasets", reason="SFTTrainer wants it: fedalt[trainer]")

    data = datasets.Dataset.from_list([{"text": tokenizer.decode(ids)} for ids in IDS])
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(str(folder), **given),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_a_trainer_resumed_in_the_middle_ends_as_an_uncut_one(kind, tiny_base, tmp_path, caplog):
    uncut = trainer_of(kind, tiny_base, tmp_path / "run")
    before = adapter_state(uncut.model)
    uncut.train()
    ended = adapter_state(uncut.model)
    assert not same(before, ended)
    middle = tmp_path / "run" / "checkpoint-2"

    resumed = trainer_of(kind, tiny_base, tmp_path / "again")
    with torch.no_grad():
        for name, tensor in resumed.model.named_parameters():
            if name.endswith((".a", ".b", "mixer")):
                tensor.fill_(9)
    resumed.train(resume_from_checkpoint=str(middle))
    assert same(adapter_state(resumed.model), ended)
    assert resumed.state.global_step == 4
    assert "missing keys" not in caplog.text

    state, at_two = adapter_state(uncut.model), middle / "model.safetensors"
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert at_two.stat().st_size < size + 200 * len(state) + 200
    fedalt.load_client_state(resumed.model, middle)
    assert not same(adapter_state(resumed.model), ended)

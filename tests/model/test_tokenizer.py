"""Tokenizers as they come: without an end, a start or padding, or with unknown tokens."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from fedalt.cli import main
from fedalt.config.schema import DataConfig, ModelConfig
from fedalt.data import Record, collate, encode
from fedalt.model import load_base
from fedalt.training import answer_loss

RECORDS = [Record("say", "yes"), Record("say a lot", "yes and no")]
END = 2


@pytest.fixture
def base(tiny_base, tmp_path):
    """A copy of the tiny base, to be spoilt."""
    return shutil.copytree(tiny_base, tmp_path / "base")


def name_tokens(base, **names):
    """Have a tokenizer's special tokens called otherwise; None: not there."""
    path = base / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), **names}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value}))


def add_tokens(base, **tokens):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(tokens.pop("words", []))
    tokenizer.add_special_tokens(tokens)
    tokenizer.save_pretrained(base)


def loss_of(base):
    """The loss of one padded batch, and the batch."""
    model, tokenizer = load_base(ModelConfig(path=str(base)))
    examples = encode(RECORDS, tokenizer, DataConfig())
    batch = collate(examples, tokenizer.pad_token_id, torch.device("cpu"))
    return answer_loss(model, batch), batch


def refused(capsys, base, tiny_data, *command):
    command = (*command, "-c", f"model.path={base}", "-c", "threads=1")
    assert main([*command, "-c", f"data.path={tiny_data}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedalt: model.path: the tokenizer of ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("names", [("eos_token",), ("eos_token", "pad_token")])
@pytest.mark.parametrize("command", ["run", "memory"])
def test_no_end_token_is_refused_by_name(base, names, command, tiny_data, tmp_path, capsys):
    name_tokens(base, **dict.fromkeys(names))
    where = ("--out", str(tmp_path / "out")) if command == "run" else ()
    error = refused(capsys, base, tiny_data, command, *where)
    assert "has no end token" in error
    assert "set eos_token in its tokenizer_config.json" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tokens", "named"), [({"words": ["ab"]}, "'ab'"), ({"eos_token": "<end>"}, "'<end>'")]
)
@pytest.mark.parametrize("command", ["run", "memory"])
def test_tokens_without_an_embedding_are_refused(
    base, tokens, named, command, tiny_data, tmp_path, capsys
):
    add_tokens(base, **tokens)
    where = ("--out", str(tmp_path / "out")) if command == "run" else ()
    error = refused(capsys, base, tiny_data, command, *where)
    assert f"tokens such as {named} beyond the model's 259 embeddings" in error


@pytest.mark.parametrize("pad", [None, "</s>", "beyond"])
def test_padding_may_be_missing_or_the_end_or_beyond_the_model(base, pad):
    """The end stands in for it, is learned all the same, and no loss depends on it."""
    wanted, usual = loss_of(base)
    if pad == "beyond":
        add_tokens(base, pad_token="<fill>")
    else:
        name_tokens(base, pad_token=pad)
    loss, batch = loss_of(base)
    assert torch.equal(loss, wanted)
    assert (batch.labels[:, -1] == END).all()
    assert torch.equal(batch.labels, usual.labels)
    assert (batch.input_ids[batch.attention_mask == 0] == END).all()
    assert not batch.attention_mask.all()


def test_a_tokenizer_that_appends_its_end_gives_one(base):
    wanted, usual = loss_of(base)
    raw = Tokenizer.from_file(str(base / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", END)]
    )
    raw.save(str(base / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(base)("a")["input_ids"][-1] == END
    loss, batch = loss_of(base)
    assert torch.equal(batch.input_ids, usual.input_ids)
    assert torch.equal(loss, wanted)


def test_a_tokenizer_without_a_start_gives_none(base):
    name_tokens(base, bos_token=None)
    loss, batch = loss_of(base)
    assert not (batch.input_ids == 1).any()
    assert loss.isfinite()


def test_a_tokenizer_that_cannot_be_read_is_named(base, tiny_data, tmp_path, capsys):
    (base / "tokenizer.json").write_text("{}")
    command = ["run", "-c", f"model.path={base}", "--data", str(tiny_data)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fedalt: model.path: cannot load '{base}': ")
    assert error.count("\n") == 1

"""Tokenizers as they come with a base: used as they are, or refused in one line."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import fedalt
from fedalt.config import DataConfig, ModelConfig
from fedalt.data import Record, collate, encode
from fedalt.model import load_base


@pytest.fixture
def base(tiny_base, tmp_path):
    """A copy of the tiny base whose tokenizer may be changed: ``base(eos_token=None)``."""

    def change(**tokens):
        folder = tmp_path / "changed"
        shutil.copytree(tiny_base, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for name, token in tokens.items():
            setattr(tokenizer, name, token)
        tokenizer.save_pretrained(folder)
        return folder

    return change


def refused(folder: Path) -> str:
    with pytest.raises(fedalt.InputError) as caught:
        load_base(ModelConfig(path=str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tokens", [{"eos_token": None}, {"eos_token": None, "pad_token": None}])
def test_a_base_without_an_end_token_is_refused_with_the_cure(base, tokens):
    message = refused(base(**tokens))
    assert "has no end token (eos_token), by which answers end; set one of its tokens" in message


@pytest.mark.parametrize("tokens", [{"pad_token": None}, {"pad_token": "</s>"}])
def test_where_the_end_token_pads_answers_still_learn_to_end(base, tokens):
    model, tokenizer = load_base(ModelConfig(path=str(base(**tokens))))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    records = [Record("say", "a"), Record("say more", "bcd")]
    examples = encode(records, tokenizer, DataConfig())
    batch = collate(examples, tokenizer.pad_token_id, torch.device("cpu"))
    assert batch.labels[:, -1].tolist() == [tokenizer.eos_token_id] * 2
    assert batch.attention_mask.sum(1).tolist() == [len(e.prompt + e.answer) for e in examples]
    assert model(**batch.inputs()).logits.isfinite().all()


def test_a_base_needs_no_begin_token(base):
    _, tokenizer = load_base(ModelConfig(path=str(base(bos_token=None))))
    (example,) = encode([Record("say", "a")], tokenizer, DataConfig(prompt="{instruction}"))
    assert tokenizer.decode(example.prompt) == "say"


def test_an_end_that_the_tokenizer_adds_itself_is_not_doubled(base):
    folder = base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    (example,) = encode([Record("say", "a")], tokenizer, DataConfig())
    assert (example.prompt + example.answer).count(tokenizer.eos_token_id) == 1


def test_tokens_that_the_model_has_no_row_for_are_told(base):
    folder = base()
    model = LlamaForCausalLM.from_pretrained(folder)
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows - 3)
    model.save_pretrained(folder)
    message = refused(folder)
    assert f"has tokens up to {rows - 1}, the model has rows for {rows - 3}; use the" in message

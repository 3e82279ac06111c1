"""The built-in sample: its eight clients, its tokenizer and its base model."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedalt
from fedalt.config.schema import DataConfig
from fedalt.data.clients import Record
from fedalt.data.sample import (
    CODED,
    RULES,
    TEST_RECORDS,
    TRAIN_RECORDS,
    sample_clients,
    secret_code,
)
from fedalt.data.tokens import render_prompt
from fedalt.data.world import FIELDS, WORDS, random_fact, sentence

ROOT = Path(__file__).parent.parent
BASE = Path(fedalt.__file__).parent / "assets" / "base"
TEMPLATE_PARTS = ("### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def test_the_same_seed_gives_the_same_clients_and_another_seed_others() -> None:
    assert sample_clients(3) == sample_clients(3)
    assert sample_clients(3) != sample_clients(4)
    assert list(sample_clients(3)) == list(sample_clients(4)) == list(RULES)


def test_eight_clients_with_ids_that_can_be_file_names() -> None:
    assert len(RULES) == 8
    assert all(re.fullmatch(r"[a-z][a-z-]*", name) for name in RULES)


@pytest.mark.parametrize("seed", [0, 1])
def test_records_have_their_fields_and_no_test_sentence_is_trained_on(seed: int) -> None:
    for name, parts in sample_clients(seed).items():
        assert len(parts["train"]) == TRAIN_RECORDS
        assert len(parts["test"]) == TEST_RECORDS
        for record in parts["train"] + parts["test"]:
            assert set(record) == {"instruction", "input", "output", "category"}
            assert all(value and value == value.strip() for value in record.values())
            assert record["category"] == name
        inputs = [record["input"] for record in parts["train"] + parts["test"]]
        assert len(set(inputs)) == len(inputs)


def test_the_prompts_do_not_tell_the_clients_apart() -> None:
    records = [row for parts in sample_clients(0).values() for row in parts["train"]]
    assert len({record["instruction"] for record in records}) == 1


def test_every_rule_notes_a_coded_field() -> None:
    fact = {field: WORDS[field][0] for field in FIELDS}
    notes = {rule.note(fact) for rule in RULES.values()}
    assert len(notes) == len(RULES)
    assert all({"number", "colour"} <= set(rule.fields) for rule in RULES.values())


def test_the_code_maps_each_word_to_another_of_its_field() -> None:
    code = secret_code(random.Random(0))
    for words in CODED.values():
        assert sorted(code[word] for word in words) == sorted(words)
        assert all(code[word] != word for word in words)
    assert len(code) == sum(map(len, CODED.values()))


def test_a_sentence_states_all_its_fields() -> None:
    fact = random_fact(random.Random(0), keep=1.0)
    for order in ("plain", "day first", "place first"):
        assert all(word in sentence(fact, order) for word in fact.values())
    bare = {"who": "Mia", "verb": "sold", "thing": "cups"}
    assert sentence(bare, "place first") == "Mia sold cups."


def test_tokens_give_back_the_text(tokenizer: Any) -> None:
    texts = [
        " two  blanks, a tab\t and\n\n\na gap ",
        "- first\n- second\n\nOPTIONS:\n- no\n- it is",
        "naïve café, Straße, 東京, 🙂",
        "(a) [b] <c> 1989 's don't it's -- ... 3.14",
        *(record["input"] for record in sample_clients(0)["map"]["test"][:20]),
    ]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_special_tokens_and_padding(tokenizer: Any, model: Any) -> None:
    assert tokenizer.pad_token_id == 0
    assert tokenizer.padding_side == "left"
    assert tokenizer("cups")["input_ids"][0] == tokenizer.bos_token_id
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings >= 1024


def test_every_fixed_part_of_the_prompt_is_one_token(tokenizer: Any) -> None:
    for part in TEMPLATE_PARTS:
        assert len(tokenizer(part, add_special_tokens=False)["input_ids"]) == 1


def test_prompt_and_answer_tokenize_alike_apart_and_joined(tokenizer: Any) -> None:
    for parts in sample_clients(0).values():
        for row in parts["test"][:10]:
            prompt, answer = render_prompt(Record(**row), DataConfig()), row["output"]
            apart = [
                token
                for text in (prompt, answer)
                for token in tokenizer(text, add_special_tokens=False)["input_ids"]
            ]
            assert apart == tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]


def test_the_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= 3_000_000


@pytest.mark.parametrize("family", ["copy", "listing", "dictionary"])
def test_the_base_does_what_its_card_says(
    family: str, tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 10 percentage points below the card, on 60 records that the card did not use."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import corpus
    from train_base import exact_match

    card = (BASE / "README.md").read_text(encoding="utf-8")
    stated = float(re.search(rf"\| {family} \| ([\d.]+) \|", card)[1])
    measured = exact_match(model, tokenizer, {family: corpus.FAMILIES[family]}, seed=99, each=60)
    assert measured[family] >= stated - 10

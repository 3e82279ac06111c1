"""Settings in words: all of them, from the dataclasses' own source."""

from pathlib import Path

import pytest

from fedalt.config.listing import list_settings
from fedalt.config.schema import Config
from fedalt.errors import InputError

ROOT = Path(__file__).parents[2]


def test_the_document_is_what_is_generated():
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    cure = "fedalt settings --markdown > docs/settings.md"
    assert written == list_settings(markdown=True) + "\n", cure


def test_every_setting_is_told_once_with_its_meaning():
    lines = list_settings(markdown=True).splitlines()
    told = [line.split("`")[1] for line in lines if line.startswith("- ")]
    assert sorted(told) == sorted(Config().flat())
    assert all("): " in line for line in lines if line.startswith("- ")), "a docstring is missing"


def test_type_default_and_docstring_are_those_of_the_source():
    assert list_settings("train.micro_batch").splitlines()[3:5] == [
        "  train.micro_batch (int | null, default null)",
        "      Examples of a batch that are run at once; null: all. Whenever memory does",
    ]
    assert 'data.splits (list[str], default ["train"])' in list_settings("data")
    assert "away (dict[str, list[int]], default {})" in list_settings("federation.away")
    assert max(map(len, list_settings().splitlines())) <= 160  # of the prompts' defaults alone


def test_a_section_or_the_last_word_of_a_key_names_settings():
    text = list_settings("lora")
    assert text.startswith("lora: The adapters put into every targeted linear layer")
    told = [line.split()[0] for line in text.splitlines() if line.startswith("  lora.")]
    assert told == [key for key in Config().flat() if key.startswith("lora.")]
    both = list_settings("batch_size")
    assert "train.batch_size" in both
    assert "evaluate.batch_size" in both
    assert "epochs" not in both


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("trian", "did you mean train?"),
        ("train.batchsize", "did you mean train.batch_size?"),
        ("max_step", "did you mean train.max_steps?"),
        ("xyzzy", "fedalt settings lists all"),
    ],
)
def test_what_is_no_setting_is_told_with_a_near_one(wanted, hint):
    with pytest.raises(InputError) as error:
        list_settings(wanted)
    assert str(error.value) == f"no setting is called {wanted!r}; {hint}"

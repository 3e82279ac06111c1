"""Commonsense suites: rows as on the hub become records whose answer is one of their options."""

import pytest

from fedalt.config.schema import DataConfig
from fedalt.data.suites import SUITES, suite_columns, suite_of, suite_record
from fedalt.errors import InputError

CHOICES = {"text": ["sink", "float", "burn"], "label": ["A", "B", "C"]}
ROWS = {
    "arc": {
        "id": "Mercury_1",
        "question": "What does dry wood do in water?",
        "choices": CHOICES,
        "answerKey": "B",
    },
    "boolq": {"question": "is wood solid", "passage": "Wood is a solid.", "answer": True},
    "hellaswag": {
        "ind": 4,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man sits on a roof.",
        "ctx_b": "he",
        "ctx": "[header] Roofs [title] A man sits on a roof. he",
        "endings": ["sings.", "starts  pulling up [substeps] roofing.", "swims.", "sleeps."],
        "source_id": "activitynet~v_1",
        "split": "train",
        "split_type": "indomain",
        "label": "1",
    },
    "openbookqa": {
        "id": "7-980",
        "question_stem": "Dry wood in water will",
        "choices": CHOICES,
        "answerKey": "B",
    },
    "piqa": {"goal": "Dry a cup.", "sol1": "Use a towel.", "sol2": "Use a fish.", "label": 0},
    "siqa": {
        "context": "Kai found a coin.",
        "question": "How does Kai feel?",
        "answerA": "sad",
        "answerB": "tall",
        "answerC": "lucky",
        "label": "3",
    },
    "winogrande": {
        "sentence": "The cup fits in the box because the _ is small.",
        "option1": "box",
        "option2": "cup",
        "answer": "2",
    },
}
ANSWERS = {
    "arc": "float",
    "boolq": "true",
    "hellaswag": "starts pulling up roofing.",
    "openbookqa": "float",
    "piqa": "Use a towel.",
    "siqa": "lucky",
    "winogrande": "cup",
}


@pytest.mark.parametrize("name", SUITES)
def test_a_row_is_known_by_its_columns_and_becomes_a_record(name):
    row = ROWS[name]
    assert suite_of(row) == name
    record = suite_record(name, row, "here")
    assert record.output == ANSWERS[name]
    assert record.output in record.options
    assert record.category == name
    assert record.instruction
    if name != "boolq":
        assert all(f"\n- {option}" in record.input for option in record.options)


def test_every_suite_can_be_named_in_a_config():
    assert ROWS.keys() == SUITES.keys()
    for name in SUITES:
        assert DataConfig(format=name).format == name
    with pytest.raises(InputError, match=r"data.format must be one of auto, records"):
        DataConfig(format="hellaswagg")


def test_marks_of_wikihow_are_taken_out():
    record = suite_record("hellaswag", ROWS["hellaswag"], "here")
    text = "Roof shingle removal: Roofs. A man sits on a roof. he\n"
    assert record.input.startswith(text)


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("hidden", ["", -1, "-1", None])
def test_a_hidden_answer_is_named_with_the_cure(name, hidden):
    answer = suite_columns(name)[-1]
    message = f"here: {answer}: the answer is hidden, .* choose other data.splits"
    with pytest.raises(InputError, match=message):
        suite_record(name, {**ROWS[name], answer: hidden}, "here")


def test_rows_of_another_kind_are_refused():
    with pytest.raises(InputError, match="the answer '9' is none of 1, 2"):
        suite_record("winogrande", {**ROWS["winogrande"], "answer": "9"}, "here")
    with pytest.raises(InputError, match="here: not as rows of siqa are"):
        suite_record("siqa", {**ROWS["siqa"], "answerA": None}, "here")
    with pytest.raises(InputError, match="here: not as rows of arc are"):
        suite_record("arc", {**ROWS["arc"], "choices": ["a", "b"]}, "here")
    with pytest.raises(InputError, match="here: the right option is empty"):
        suite_record("piqa", {**ROWS["piqa"], "sol1": " "}, "here")
    assert suite_of({"question", "answer"}) == ""

"""Commonsense suites: rows as the Hugging Face hub has them become multiple-choice records.

===========  ==========================================  ===================================
name         hub id                                      what is chosen
===========  ==========================================  ===================================
arc          allenai/ai2_arc:ARC-Easy, :ARC-Challenge    an answer to a question
boolq        google/boolq                                true or false, given a passage
hellaswag    Rowan/hellaswag                             the ending of a text
openbookqa   allenai/openbookqa:main                     an answer to a question
piqa         baber/piqa                                  one of two ways to a goal
siqa         lighteval/siqa                              what people feel, want or do
winogrande   allenai/winogrande:winogrande_xl            what fills a blank
===========  ==========================================  ===================================

The answer is an option's text, not its letter, so that a client's model may either generate it or
rank the options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.data.records import Record
from fedalt.errors import InputError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Suite:
    """How rows of one suite read.

    Attributes:
        columns: those that the rows have, the answer's last.
        instruction: the same for all rows.
        question: what comes before the listed options.
        options: the candidate answers.
        names: what the answer's column calls them, in order; None: as ``choices`` does.
        listed: whether the prompt lists the options.
    """

    columns: tuple[str, ...]
    instruction: str
    question: Callable[[Row], str]
    options: Callable[[Row], Sequence[str]]
    names: tuple[str, ...] | None
    listed: bool = True


def suite_of(columns: Collection[str]) -> str:
    """The name of the suite that has rows of these columns; empty: none."""
    return next((name for name, suite in SUITES.items() if set(suite.columns) <= set(columns)), "")


def suite_columns(name: str) -> tuple[str, ...]:
    """The columns that rows of a suite have; others are passed over."""
    return SUITES[name].columns


def suite_record(name: str, row: Row, where: str) -> Record:
    """The record of one row; its category is the suite's name.

    Args:
        name: of the suite.
        row: with all of ``suite_columns(name)``.
        where: what a message calls the row.

    Raises:
        InputError: the answer is hidden, as in a suite's test split, or none of the options, or a
            column is not as in the suite.
    """
    try:
        return _suite_record(name, row, where)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise InputError(f"{where}: not as rows of {name} are; set data.format") from None


def _suite_record(name: str, row: Row, where: str) -> Record:
    suite = SUITES[name]
    options = [" ".join(text.split()) for text in suite.options(row)]
    names = row["choices"]["label"] if suite.names is None else suite.names
    answer = options[_position(row[suite.columns[-1]], names, f"{where}: {suite.columns[-1]}")]
    if not answer:
        raise InputError(f"{where}: the right option is empty; remove the row")
    question = suite.question(row).strip()
    lines = [f"- {option}" for option in options] if suite.listed else []
    return Record(
        instruction=suite.instruction,
        output=answer,
        input="\n".join([question, *lines]),
        category=name,
        options=tuple(options),
    )


def _position(value: Any, names: Sequence[str], where: str) -> int:
    text = "" if value is None else str(value).strip()
    if text in ("", "-1"):
        raise InputError(
            f"{where}: the answer is hidden, as in a test split; choose other data.splits"
        )
    if text not in names:
        raise InputError(f"{where}: the answer {text!r} is none of {', '.join(names)}")
    return list(names).index(text)


def _plain(text: str) -> str:
    """HellaSwag's text without the marks (``[header]``) that WikiHow's pages left in it."""
    return " ".join(re.sub(r"\[[^\]]*\]", " ", text.replace(" [title]", ". ")).split())


def _choices(row: Row) -> Sequence[str]:
    return row["choices"]["text"]


SUITES = {
    "arc": Suite(
        ("question", "choices", "answerKey"),
        "Answer the question with one of the choices below it.",
        lambda row: row["question"],
        _choices,
        None,
    ),
    "boolq": Suite(
        ("passage", "question", "answer"),
        "Read the passage, then answer the question about it with true or false.",
        lambda row: f"{row['passage'].strip()}\n\nQuestion: {row['question'].strip().rstrip('?')}?",
        lambda row: ("false", "true"),
        ("False", "True"),
        listed=False,
    ),
    "hellaswag": Suite(
        ("activity_label", "ctx", "endings", "label"),
        "Continue the text with the most plausible of the endings below it.",
        lambda row: f"{row['activity_label'].strip()}: {_plain(row['ctx'])}",
        lambda row: [_plain(ending) for ending in row["endings"]],
        ("0", "1", "2", "3"),
    ),
    "openbookqa": Suite(
        ("question_stem", "choices", "answerKey"),
        "Answer or complete what is asked with one of the choices below it.",
        lambda row: row["question_stem"],
        _choices,
        None,
    ),
    "piqa": Suite(
        ("goal", "sol1", "sol2", "label"),
        "Say which of the two ways below reaches the goal.",
        lambda row: f"Goal: {row['goal']}",
        lambda row: (row["sol1"], row["sol2"]),
        ("0", "1"),
    ),
    "siqa": Suite(
        ("context", "question", "answerA", "answerB", "answerC", "label"),
        "Read the situation and answer the question about it with one of the answers below.",
        lambda row: f"{row['context'].strip()} {row['question'].strip()}",
        lambda row: (row["answerA"], row["answerB"], row["answerC"]),
        ("1", "2", "3"),
    ),
    "winogrande": Suite(
        ("sentence", "option1", "option2", "answer"),
        "Say which of the two options below belongs in the blank (_) of the sentence.",
        lambda row: row["sentence"],
        lambda row: (row["option1"], row["option2"]),
        ("1", "2"),
    ),
}

"""The batches that memory is foretold for: as large as any that a run can meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedalt.config import Config
from fedalt.data import Example, ImageExample, ImageRecord, Parts, Record, is_on_hub, load_clients

UNKNOWN = 2**31
"""Records of a client that is not at hand: more than any batch."""


@dataclass(frozen=True)
class Assumed:
    """One example, as long as any, that fills all batches.

    Attributes:
        test_record: what ``test_example`` was made of, as far as scores are concerned.
        train, test: how many of them the largest client has.
        size: of an example to train on and of one to evaluate on, for people; ``source``: why.
    """

    train_example: Any
    test_example: Any
    test_record: Any
    train: int
    test: int
    size: tuple[str, str]
    source: str


def read_at_hand(config: Config) -> list[Parts]:
    """The records of every client where they lie here; nothing is downloaded only to count with.

    Raises:
        InputError: the data are bad.
    """
    paths = config.data.sources.values() or [config.data.path]
    if any(map(is_on_hub, paths)):
        return []
    return [c.read() for c in load_clients(config.data, config.partition, config.seed)]


def assume(config: Config, parts: Sequence[Parts], encode: Callable[..., list[Any]]) -> Assumed:
    """What to count with, given the records at hand, or none, and a task's ``encode``."""
    return _images(parts) if config.data.kind == "image" else _texts(config, parts, encode)


def _texts(config: Config, parts: Sequence[Parts], encode: Callable[..., list[Any]]) -> Assumed:
    data = config.data
    if not parts:
        half = data.max_length // 2
        example, record = Example((0,) * (data.max_length - half), (0,) * half), Record("", "")
        size = (_size(example),) * 2
        source = f"data.max_length, half of it answer: {data.name} is not at hand"
        return Assumed(example, example, record, UNKNOWN, UNKNOWN, size, source)
    train = [example for part in parts for example in encode(part.train)]
    records = [record for part in parts for record in part.test]
    test = encode(records, True)
    examples = _longest(train), _largest(test)
    options = max(len(record.options) for record in records)  # each is a row of its own
    most = max(len(part.train) for part in parts)
    most_tested = max(1, options) * max(len(part.test) for part in parts)
    size = _size(examples[0]), _size(examples[1])
    source = f"the longest of {data.name}"
    return Assumed(*examples, records[0], most, most_tested, size, source)


def _longest(examples: Sequence[Example]) -> Example:
    """As long as the longest example, with an answer as long as the longest answer."""
    length = max(len(example.prompt) + len(example.answer) for example in examples)
    answer = max(len(example.answer) for example in examples)
    return Example((0,) * (length - answer), (0,) * answer)


def _largest(examples: Sequence[Example]) -> Example:
    """The longest prompt, from which generation starts, with the longest answer."""
    prompt = max(len(example.prompt) for example in examples)
    answer = max(len(example.answer) for example in examples)
    return Example((0,) * prompt, (0,) * answer)


def _size(example: Example) -> str:
    answer = len(example.answer)
    return f"{len(example.prompt) + answer} tokens, {answer} of them answer"


def _images(parts: Sequence[Parts]) -> Assumed:
    record = ImageRecord(np.zeros((8, 8, 3), np.uint8), "")
    example = ImageExample(record, 0)
    train = max((len(part.train) for part in parts), default=UNKNOWN)
    test = max((len(part.test) for part in parts), default=UNKNOWN)
    return Assumed(
        example, example, record, train, test, ("images", "images"), "the processor's size"
    )

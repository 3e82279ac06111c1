"""Threads, and one report a table: JSON and Markdown under ``bench/results/cpu``."""

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch

from .measure import surroundings
from .report import RESULTS, write_table

COMMAND = "make bench"

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def one_thread(two_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def layer_results() -> Iterator[Rows]:
    """Rows of the layer's table; written when its last case is done."""
    rows: Rows = []
    yield rows
    _publish("layer", "The layer, forward and backward, two threads", rows)


@pytest.fixture(scope="session")
def step_results() -> Iterator[Rows]:
    """Rows of the training step's table; written when its last case is done."""
    rows: Rows = []
    yield rows
    _publish("step", "A local training step of the built-in base, one thread", rows)


def _publish(name: str, title: str, rows: Rows) -> None:
    if not rows:
        return
    about = {"command": COMMAND, **surroundings(), "peft": peft.__version__}
    print(f"\n{write_table(RESULTS / 'cpu', name, title, about, rows)}")

"""Threads, and one report a table: JSON and Markdown under ``bench/results/cpu``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from .measure import markdown, surroundings

RESULTS = Path(__file__).parent / "results" / "cpu"
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
    write_table("layer", "The layer, forward and backward, two threads", rows)


@pytest.fixture(scope="session")
def step_results() -> Iterator[Rows]:
    """Rows of the training step's table; written when its last case is done."""
    rows: Rows = []
    yield rows
    write_table("step", "A local training step of the built-in base, one thread", rows)


def write_table(name: str, title: str, rows: Rows) -> None:
    if not rows:
        return
    about = {"command": COMMAND, **surroundings(), "peft": peft.__version__}
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {"about": about, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    described = "".join(f"- {key}: {value}\n" for key, value in about.items())
    table = markdown(rows[0], [row.values() for row in rows])
    text = f"# {title}\n\n{described}\n{table}"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")

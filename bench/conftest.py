"""Two threads, and one report for all the cases of a run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from .measure import markdown, surroundings

RESULTS = Path(__file__).parent / "results" / "cpu"
COMMAND = "python -m pytest bench --benchmark-only"
THREADS = 2


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def layer_results() -> Iterator[list[dict[str, Any]]]:
    """Rows of the layer's table; written as JSON and Markdown when the last case is done."""
    rows: list[dict[str, Any]] = []
    yield rows
    if not rows:
        return
    about = {"command": COMMAND, **surroundings(), "peft": peft.__version__}
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {"about": about, "rows": rows}
    (RESULTS / "layer.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    described = "".join(f"- {key}: {value}\n" for key, value in about.items())
    table = markdown(rows[0], [row.values() for row in rows])
    text = f"# The layer, forward and backward\n\n{described}\n{table}"
    (RESULTS / "layer.md").write_text(text, encoding="utf-8")

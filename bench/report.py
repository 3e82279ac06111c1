"""Tables as JSON and Markdown, one folder a device under ``bench/results``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .measure import markdown

RESULTS = Path(__file__).parent / "results"

Rows = Sequence[Mapping[str, Any]]


def write_table(
    folder: Path,
    name: str,
    title: str,
    about: Mapping[str, str],
    rows: Rows,
    notes: Sequence[str] = (),
) -> str:
    """Writes ``name.json`` and ``name.md``, and returns the Markdown.

    Args:
        about: what the figures depend on: the command, the machine, versions.
        rows: all with the keys of the first, which head the table.
        notes: what was left out and why, below the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"about": dict(about), "rows": [dict(row) for row in rows]}
    if notes:
        record["notes"] = list(notes)
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    described = "".join(f"- {key}: {value}\n" for key, value in about.items())
    table = markdown(rows[0], [row.values() for row in rows]) if rows else "No row.\n"
    noted = "\n" + "".join(f"- {note}\n" for note in notes) if notes else ""
    page = f"# {title}\n\n{described}\n{table}{noted}"
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    return page

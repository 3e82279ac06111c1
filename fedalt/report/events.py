"""What a run has written down: events, and the times beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedalt.errors import InputError

Event = Mapping[str, Any]
ABOUT = ("event", "round", "client", "part", "unseen")


def read_events(path: Path) -> list[Event]:
    """The events of a ``metrics.jsonl``; a last line cut short by a kill is passed over.

    Raises:
        InputError: an earlier line is damaged.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    events = []
    for index, line in enumerate(lines):
        try:
            events.append(json.loads(line))
        except ValueError:
            cure = "remove that line to report on the rest"
            raise InputError(f"{path}:{index + 1}: broken JSON; {cure}") from None
    return events


def read_events_of(run_dir: Path) -> list[Event]:
    """A run's own events, then those of the clients that joined it, each from its own file."""
    joined = sorted((run_dir / "joined").glob("[!.]*.jsonl"))
    return [event for path in (run_dir / "metrics.jsonl", *joined) for event in read_events(path)]


def read_times(path: Path) -> list[Event]:
    """The lines of a ``times.jsonl``; of a round done twice, after a kill, the later ones."""
    rows = {(row["round"], row["phase"], row["client"]): row for row in read_events(path)}
    return list(rows.values())


def metrics_of(event: Event) -> dict[str, float]:
    """The numbers of an event that are scores."""
    return {k: v for k, v in event.items() if k not in ABOUT and isinstance(v, int | float)}

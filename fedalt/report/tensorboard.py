"""A run's events for TensorBoard: a run a client, so that clients lie over one another."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedalt.errors import not_installed
from fedalt.report.events import Event, metrics_of, read_events_of
from fedalt.report.summary import read_results

Scalar = tuple[str, float, int]
"""Tag, value and step, as TensorBoard has them; a step is a round, or an epoch of a fit."""


def write_tensorboard(run_dir: Path) -> Path:
    """Write ``report/tensorboard`` afresh: ``mean``, ``client-ID`` and ``unseen-ID``.

    Scores are percent, losses nats (a token, or an image), traffic bytes a round.

    Returns:
        The folder for ``tensorboard --logdir``.

    Raises:
        InputError: TensorBoard is not installed, or nothing is scored yet.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise not_installed("--tensorboard", "tensorboard", "tensorboard") from None
    events, results = read_events_of(run_dir), read_results(run_dir)
    root = run_dir / "report" / "tensorboard"
    shutil.rmtree(root, ignore_errors=True)
    for name, scalars in _runs(events, results).items():
        with SummaryWriter(str(root / quote(name, safe=""))) as writer:
            for tag, value, step in scalars:
                writer.add_scalar(tag, value, step)
    return root


def _runs(events: Iterable[Event], results: Mapping[str, Any]) -> dict[str, list[Scalar]]:
    """The scalars of every run, by its name."""
    runs: dict[str, list[Scalar]] = {}
    for kind, group in (("client", results), ("unseen", results.get("unseen"))):
        for name in group["clients"] if group else ():
            own = (event for event in events if event.get("client") == name)
            runs[f"{kind}-{name}"] = [scalar for event in own for scalar in scalars_of(event)]
    runs["mean"] = [
        ("traffic/so_far" if name == "bytes" else f"test/{name}", value, row["round"])
        for row in results["curve"]
        for name, value in row.items()
        if name != "round"
    ]
    return runs


def scalars_of(event: Event) -> Iterator[Scalar]:
    """What one event has to draw; ids, reasons and answers are not drawn."""
    if event["event"] == "answers":
        return
    group = {"evaluate": "test", "part": event.get("part", "")}.get(event["event"], event["event"])
    numbers = dict(metrics_of(event))
    if event["event"] == "gates":
        numbers = event["layers"]
    for name, value in numbers.items():
        yield f"{group}/{name}", value, event["round"]

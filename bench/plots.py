"""Two plots of the kernel table: time over the plain linear's, and share of the bandwidth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .candidates import PLAIN
from .cases import DIRECTIONS, MOST_DECODE_ROWS

RANK = 8
Row = Mapping[str, Any]


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws ``ratio.png`` and ``decode.png``; needs matplotlib."""
    shown = [row for row in rows if row["r"] == RANK and row["dropout"] == "0.0"]
    ratio = _grid(
        [row for row in shown if row["candidate"] != PLAIN],
        "time / plain",
        folder / "ratio.png",
        (0.9, None),
    )
    decode = _grid(
        [row for row in shown if row["M"] <= MOST_DECODE_ROWS],
        "% of ceiling",
        folder / "decode.png",
        (0.0, 100.0),
    )
    return [path for path in (ratio, decode) if path is not None]


def _grid(
    rows: Sequence[Row], quantity: str, path: Path, limits: tuple[float, float | None]
) -> Path | None:
    """A panel a layer and direction, a line a candidate, against M; None without rows."""
    if not rows:
        return None
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    directions = [d for d in DIRECTIONS if any(row["direction"] == d for row in rows)]
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    size = (4.5 * len(directions) + 2.5, 2.8 * len(layers))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(layers), len(directions), squeeze=False)
    lines = {}
    for layer, across in zip(layers, panels, strict=True):
        for direction, axes in zip(directions, across, strict=True):
            for i, name in enumerate(names):
                points = sorted(
                    (row["M"], row[quantity])
                    for row in rows
                    if (row["layer"], row["direction"], row["candidate"])
                    == (layer, direction, name)
                )
                if points:
                    style = {"marker": "ov^sD*Px"[i % 8], "color": f"C{i}", "linewidth": 1.0}
                    lines[name] = axes.plot(*zip(*points, strict=True), **style)[0]
            axes.set_xscale("log", base=2)
            axes.set_title(f"{layer}, {direction}, r {RANK}", fontsize=9)
            axes.set_xlabel("M, tokens")
            axes.set_ylabel(quantity)
            axes.set_ylim(*limits)
            axes.grid(axis="y", color="0.9")
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path

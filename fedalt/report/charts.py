"""Charts as inline SVG: curves with their names at their ends, stacked bars, maps of gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from fedalt.report.page import text
from fedalt.report.tables import shorten

FEW = 8
"""Up to so many lines have a colour each; more are thin, with the mean and the worst on top."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 52, 14, 12, 46
LETTER, LINE, LONGEST = 9, 17, 22
"""Of the names at the curves' ends, in units of the drawing: a letter's width, a line's height;
and the most letters."""


@dataclass(frozen=True)
class Line:
    """A curve: ``style`` is a CSS class; one that is not ``named`` has no name at its end."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    named: bool = True


@dataclass(frozen=True)
class _Axes:
    """Where numbers lie in a chart, and all of the chart but its marks."""

    x_low: float
    x_high: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    width: float = WIDTH
    """Of the drawing; beyond ``WIDTH`` there is room for names."""

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The spot of a point, in the units of the drawing."""
        across = (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0]) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    def figure(self, caption: str, about: str, x_label: str, marks: str, below: str = "") -> str:
        """The chart; ``about`` tells it to those who cannot see it."""
        parts = []
        for tick in self.y_ticks:
            _, y = self.place(self.x_low, tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
        for tick in (tick for tick in self.x_ticks if self.x_low <= tick <= self.x_high):
            x, _ = self.place(tick, self.y_ticks[0])
            parts.append(f'<text x="{x}" y="{HEIGHT - 27}" text-anchor="middle">{tick:g}</text>')
        parts.append(
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{text(x_label)}</text>"
        )
        return (
            f"<figure><figcaption>{text(caption)}</figcaption>"
            f'<svg class="chart" viewBox="0 0 {self.width} {HEIGHT}" role="img" '
            f'style="max-width:{round(1.1 * self.width)}px" '
            f'aria-label="{text(about)}">{"".join(parts)}{marks}</svg>{below}</figure>'
        )


def line_chart(caption: str, x_label: str, lines: Sequence[Line]) -> str:
    """Curves over one pair of axes that fit the finite points; where there is none, no chart.

    Several curves have their names at their ends, apart from each other; one is named by the
    caption.
    """
    drawn = [(a, [point for point in a.points if all(map(math.isfinite, point))]) for a in lines]
    drawn = [(line, points) for line, points in drawn if points]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    if not xs:
        return ""
    low, high, whole = min(xs), max(xs), all(isinstance(x, int) for x in xs)
    across = (low, high, _ticks(low, high, whole)) if low < high else (low - 1, low + 1, [low])
    named = [(line, points[-1]) for line, points in drawn if line.named] if drawn[1:] else []
    room = max((LETTER * len(shorten(line.name, LONGEST)) + 20 for line, _ in named), default=0)
    axes = _Axes(*across, _ticks(min(ys), max(ys)), WIDTH + room)
    marks = []
    for line, points in drawn:
        corners = [f"{x},{y}" for x, y in (axes.place(*point) for point in points)]
        # With round caps, a line that goes nowhere is a dot.
        dot = ' stroke-linecap="round" style="stroke-width:7"' if len(corners) == 1 else ""
        ends = " to ".join(f"{y:.4g}" for _, y in points[:1] + points[1:][-1:])
        marks.append(
            f'<polyline class="{line.style}"{dot} points="{" ".join(corners * (1 + bool(dot)))}">'
            f"<title>{text(line.name)}: {ends}</title></polyline>"
        )
    about = f"{caption}: {len(drawn)} lines between {min(ys):.4g} and {max(ys):.4g}"
    ends_of = [(line, *axes.place(*end)) for line, end in named]
    return axes.figure(caption, about, x_label, "".join(marks) + _names(ends_of))


def _names(ends: Sequence[tuple[Line, float, float]]) -> str:
    """The names of curves right of the axes, each joined to the curve's end by a leader."""
    parts, right = [], WIDTH - RIGHT
    ends = sorted(ends, key=lambda end: end[2])
    for (line, x, y), at in zip(ends, apart([y for _, _, y in ends]), strict=True):
        leader = f"M{x},{y} L{right + 2},{y} L{right + 16},{at:.1f} h8"
        far = " far" if x < right else ""  # a curve that ends early does not go on
        parts.append(
            f'<path class="leader {line.style}{far}" d="{leader}"/>'
            f'<text class="name" x="{right + 28}" y="{at + 4:.1f}">'
            f"{text(shorten(line.name, LONGEST))}</text>"
        )
    return "".join(parts)


def apart(heights: Sequence[float]) -> list[float]:
    """Heights, given from the top down, moved as little as it takes to be a line apart.

    Least squares under ``y[i + 1] >= y[i] + LINE``: of heights less what they must be apart, the
    isotonic regression, by pooling neighbours that are out of order. Then pushed into the drawing,
    and closer together where it holds no more.
    """
    if not heights:
        return []
    top, bottom = float(TOP), float(HEIGHT - BOTTOM)
    line = min(LINE, (bottom - top) / len(heights))
    pools: list[tuple[float, int]] = []  # mean and size
    for place, height in enumerate(heights):
        mean, size = height - place * line, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    starts = [mean for mean, size in pools for _ in range(size)]
    most = bottom - (len(heights) - 1) * line
    return [min(max(start, top), most) + place * line for place, start in enumerate(starts)]


def stacked_bars(
    caption: str, x_label: str, bars: Mapping[int, Mapping[str, float]], names: Sequence[str]
) -> str:
    """A bar for every whole number, of parts from 0 upward; where there is none, no chart.

    ``names`` are all parts, in the legend's order.
    """
    if not bars:
        return ""
    styles = {name: f"c{i % FEW}" for i, name in enumerate(names)}
    low, high = min(bars), max(bars)
    top = max(sum(bar.values()) for bar in bars.values())
    axes = _Axes(low - 0.5, high + 0.5, _ticks(low, high, whole=True), _ticks(0, top))
    marks = []
    for x, bar in bars.items():
        base = 0.0
        for name, size in bar.items():
            left, bottom = axes.place(x - 0.4, base)
            right, upper = axes.place(x + 0.4, base + size)
            base += size
            marks.append(
                f'<rect class="{styles[name]}" x="{left}" y="{upper}" width="{right - left:.1f}" '
                f'height="{bottom - upper:.1f}"><title>{x}, {text(name)}: {size:.3g}</title></rect>'
            )
    about = f"{caption}: {len(bars)} bars of {', '.join(styles)}, at most {top:.3g}"
    return axes.figure(caption, about, x_label, "".join(marks), _legend(styles))


def _legend(keys: Mapping[str, str]) -> str:
    """Names beside the look of what they name, a CSS class each."""
    items = "".join(
        '<span><svg viewBox="0 0 22 10" aria-hidden="true">'
        f'<polyline class="{style}" points="0,5 22,5"/></svg>{text(name)}</span>'
        for name, style in keys.items()
    )
    return f'<div class="legend">{items}</div>'


def heat_map(caption: str, columns: Mapping[str, Mapping[str, float]], ends: Sequence[str]) -> str:
    """Cells of numbers in [0, 1], blue below 0.5 and orange above; where there is none, no map.

    Args:
        caption: what the numbers are.
        columns: by column name, numbers by row name. Rows may differ between columns.
        ends: what low and what high numbers mean.
    """
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    if not rows:
        return ""
    far = max(abs(value - 0.5) for column in columns.values() for value in column.values())
    reach = next((step for step in (0.05, 0.1, 0.2, 0.3) if far <= step), 0.5)
    levels = zip(*(row.split(".")[:-1] for row in rows), strict=False)
    shared = sum(len(own[0]) + 1 for own in takewhile(lambda own: len(set(own)) == 1, levels))
    wide, high = min(max(640 / len(columns), 6), 60), min(max(480 / len(rows), 5), 20)
    left = 8 * max(len(row) - shared for row in rows) + 8
    top = 8 * min(max(map(len, columns)), 20) + 8
    parts = []
    for i, row in enumerate(rows):
        if i % math.ceil(13 / high) == 0:
            parts.append(
                f'<text x="{left - 6}" y="{top + (i + 0.5) * high + 4:.1f}" text-anchor="end">'
                f"{text(row[shared:])}</text>"
            )
    for j, (name, column) in enumerate(columns.items()):
        x = left + j * wide
        if j % math.ceil(13 / wide) == 0:
            turn = f"translate({x + wide / 2 + 4:.1f} {top - 6}) rotate(-90)"
            parts.append(f'<text transform="{turn}">{text(shorten(name, 20))}</text>')
        for i, row in enumerate(rows):
            if row in column:
                box = f'x="{x:.1f}" y="{top + i * high:.1f}" width="{wide:.1f}" height="{high:.1f}"'
                parts.append(_shade(column[row], reach, box, f"{name}, {row}: {column[row]:.3f}"))
    width, height = math.ceil(left + wide * len(columns)), math.ceil(top + high * len(rows))
    about = f"{caption}: {len(rows)} rows by {len(columns)} columns, up to {far:.2f} from 0.5"
    return (
        f'<figure class="all"><figcaption>{text(caption)}</figcaption>{_ramp(reach, ends)}'
        f'<div class="wide" tabindex="0"><svg viewBox="0 0 {width} {height}" '
        f'style="width:{width}px" role="img" aria-label="{text(about)}">{"".join(parts)}</svg>'
        "</div></figure>"
    )


def _shade(value: float, reach: float, box: str, title: str) -> str:
    """A cell whose colour goes by how far, of ``reach``, the value is from 0.5."""
    depth, style = min(abs(value - 0.5) / reach, 1), "c4" if value > 0.5 else "c0"
    return (
        f'<rect class="null" {box}/><rect class="{style}" fill-opacity="{depth:.2f}" {box}>'
        f"<title>{text(title)}</title></rect>"
    )


def _ramp(reach: float, ends: Sequence[str]) -> str:
    """The colours from end to end in small steps, with numbers below and what the ends mean."""
    steps, wide = 30, 8
    parts = [
        _shade(value, reach, f'x="{i * wide}" y="0" width="{wide}" height="12"', f"{value:.2f}")
        for i in range(steps)
        for value in [0.5 + reach * (2 * (i + 0.5) / steps - 1)]
    ]
    ticks = ((0, "start", -1), (steps * wide / 2, "middle", 0), (steps * wide, "end", 1))
    parts += [
        f'<text x="{x:g}" y="26" text-anchor="{anchor}">{0.5 + side * reach:g}</text>'
        for x, anchor, side in ticks
    ]
    return (
        f'<div class="ramp"><span>{text(ends[0])}</span><svg viewBox="0 0 {steps * wide} 30" '
        f'aria-hidden="true">{"".join(parts)}</svg><span>{text(ends[1])}</span></div>'
    )


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to seven round numbers, from at or below ``low`` to at or above ``high``."""
    span = (high - low) or max(abs(high), 1)
    power = 10 ** math.floor(math.log10(span / 3))
    step = max(power * next((f for f in (5, 2) if span / (power * f) >= 3), 1), 1 if whole else 0)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        first, last = (first - 1, last) if low > 0 else (first, last + 1)
    return [round(step * i, 12) for i in range(first, last + 1)]

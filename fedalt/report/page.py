"""What an HTML page of results is made of: no network, no library, inline SVG.

Colours follow the reader's light or dark setting. All text from outside passes ``text``.
``report`` and ``compare`` put a run's and a comparison's page together from these parts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from fedalt.report import tables

FEW = 8
"""Up to so many lines have a colour each; more are thin, with the mean and the worst on top."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 52, 14, 12, 46

STYLE = """
:root{--page:#fcfcfb;--ink:#1a1a19;--soft:#62615c;--rule:#dddcd6;--null:#e9e8e3;--worst:#c93636;
--c0:#2a78d6;--c1:#12805a;--c2:#b87a00;--c3:#4a3aa7;--c4:#d9541e;--c5:#c2497f;--c6:#5b7f00;
--c7:#6d6c68}
@media(prefers-color-scheme:dark){:root{--page:#1a1a19;--ink:#f3f2ee;--soft:#b3b1a9;--rule:#3b3a37;
--null:#33322f;--worst:#f07070;--c0:#5598e7;--c1:#2bb58a;--c2:#dba02b;--c3:#9b91f0;--c4:#f08150;
--c5:#e77fae;--c6:#9bbf45;--c7:#a3a19a}}
*{box-sizing:border-box}
body{background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif;margin:0 auto;
padding:1.5rem 1rem 3rem;max-width:76rem}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
p,figcaption,dt{color:var(--soft)}
dl{display:flex;flex-wrap:wrap;gap:.4rem 2rem;margin:0}dt{font-size:.85rem}
dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums}
.wide{overflow:auto;max-height:44rem}.figures{display:flex;
flex-wrap:wrap;gap:1.5rem 2rem;margin-top:1rem}
figure{margin:0;flex:1 1 min(26rem,100%);max-width:36rem;min-width:0}
figure.all{flex-basis:100%;max-width:none}
figcaption{margin-bottom:.3rem}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,.words th,.words td{text-align:left}.words td{white-space:normal}
thead th{position:sticky;top:0;background:var(--page);color:var(--soft);font-weight:600}
tr>:first-child{position:sticky;left:0;background:var(--page)}thead th:first-child{z-index:1}
tbody th,tfoot th{font-weight:400}tfoot{position:sticky;bottom:0;background:var(--page)}
tfoot th,tfoot td{color:var(--soft);font-style:italic}
th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid var(--c0)}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:13px}
@media(max-width:34rem){svg.chart text{font-size:16px}}
.grid{stroke:var(--rule)}polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.thin{stroke:var(--c0);stroke-width:1;stroke-opacity:.3}.mean{stroke:var(--ink);stroke-width:3}
.worst{stroke:var(--worst);stroke-width:2.5;stroke-dasharray:6 3}.dashed{stroke-dasharray:8 4}
rect.null{fill:var(--null)}polyline.null{stroke:var(--null)}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.2rem 0;font-size:.85rem}
.legend span{overflow-wrap:anywhere}.legend svg{display:inline-block;width:22px;height:10px;
margin-right:.35rem}.legend polyline{stroke-width:4}
details{margin-top:2rem}pre{overflow:auto;font-size:.85rem}
""" + "".join(
    f"polyline.c{i}{{stroke:var(--c{i})}}rect.c{i}{{fill:var(--c{i})}}" for i in range(FEW)
)

SCRIPT = """
for (const head of document.querySelectorAll(".sortable thead th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.onclick = () => {
    const column = head.cellIndex, body = head.closest("table").tBodies[0];
    const sign = head.ariaSort === "descending" ? 1 : -1;
    for (const other of head.parentNode.cells) other.ariaSort = null;
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const key = row => row.cells[column].textContent, value = row => parseFloat(key(row));
    const compare = (a, b) => column
      ? (isNaN(value(a)) - isNaN(value(b)) || sign * (value(a) - value(b)))
      : sign * key(a).localeCompare(key(b), undefined, {numeric: true});
    body.append(...[...body.rows].sort(compare));
  };
}
"""


@dataclass(frozen=True)
class Line:
    """A curve: ``style`` is a CSS class, and lines without a place in the legend are nameless."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    in_legend: bool = True


def text(value: object) -> str:
    """Any value as HTML that shows it and does nothing else."""
    return html.escape(tables.printable(str(value)))


def document(title: str, facts: Mapping[str, str], sections: Sequence[str], config: str) -> str:
    """The whole page; ``facts`` are short values by name, ``sections`` HTML, ``config`` YAML."""
    lines = "\n".join(map(text, config.splitlines()))
    rows = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in facts.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{text(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><main><h1>{text(title)}</h1>\n<dl>{rows}</dl>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<details><summary>config.yaml</summary><pre>{lines}</pre></details>"
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what belongs to it; nothing where there is nothing."""
    body = "".join(parts)
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def figures(*charts: str) -> str:
    """Charts side by side where there is room."""
    return f'<div class="figures">{"".join(charts)}</div>' if any(charts) else ""


def sheet_html(sheet: tables.Sheet, words: bool = False) -> str:
    """A table that can be sorted by any column; ``words`` when its cells are not numbers."""

    def row(cells: Sequence[str]) -> str:
        tail = "".join(f"<td>{text(value)}</td>" for value in cells[1:])
        return f'<tr><th scope="row">{text(cells[0])}</th>{tail}</tr>'

    head = "".join(f'<th scope="col">{text(title)}</th>' for title in sheet.header)
    kind = "sortable words" if words else "sortable"
    foot = f"<tfoot>{''.join(map(row, sheet.foot))}</tfoot>" if sheet.foot else ""
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(map(row, sheet.rows))}</tbody>{foot}</table></div>"
    )


def legend(keys: Mapping[str, str]) -> str:
    """Names beside the look of what they name, a CSS class each."""
    items = "".join(
        '<span><svg viewBox="0 0 22 10" aria-hidden="true">'
        f'<polyline class="{style}" points="0,5 22,5"/></svg>{text(name)}</span>'
        for name, style in keys.items()
    )
    return f'<div class="legend">{items}</div>' if items else ""


@dataclass(frozen=True)
class _Axes:
    """Where numbers lie in a chart, and all of the chart but its marks."""

    x_low: float
    x_high: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The spot of a point, in the units of the drawing."""
        across = (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0]) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    def figure(
        self, caption: str, about: str, x_label: str, marks: str, keys: Mapping[str, str]
    ) -> str:
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
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{text(about)}">{"".join(parts)}{marks}</svg>{legend(keys)}</figure>'
        )


def line_chart(caption: str, x_label: str, lines: Sequence[Line]) -> str:
    """Curves over one pair of axes that fit the finite points; where there is none, no chart."""
    drawn = [(a, [point for point in a.points if all(map(math.isfinite, point))]) for a in lines]
    drawn = [(line, points) for line, points in drawn if points]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    if not xs:
        return ""
    low, high, whole = min(xs), max(xs), all(isinstance(x, int) for x in xs)
    across = (low, high, _ticks(low, high, whole)) if low < high else (low - 1, low + 1, [low])
    axes = _Axes(*across, _ticks(min(ys), max(ys)))
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
    keys = {line.name: line.style for line in lines if line.in_legend}
    return axes.figure(caption, about, x_label, "".join(marks), keys)


def stacked_bars(caption: str, x_label: str, bars: Mapping[int, Mapping[str, float]]) -> str:
    """A bar for every whole number, of parts from 0 upward; where there is none, no chart."""
    if not bars:
        return ""
    styles = {
        name: f"c{i % FEW}"
        for i, name in enumerate(dict.fromkeys(n for b in bars.values() for n in b))
    }
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
    return axes.figure(caption, about, x_label, "".join(marks), styles)


def heat_map(caption: str, columns: Mapping[str, Mapping[str, float]]) -> str:
    """Cells of numbers in [0, 1], blue below 0.5 and orange above; where there is none, no map.

    Args:
        caption: what the numbers are.
        columns: by column name, numbers by row name. Rows may differ between columns.
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
            shown = name if len(name) <= 20 else f"{name[:19]}…"
            turn = f"translate({x + wide / 2 + 4:.1f} {top - 6}) rotate(-90)"
            parts.append(f'<text transform="{turn}">{text(shown)}</text>')
        for i, row in enumerate(rows):
            if row in column:
                depth = min(abs(column[row] - 0.5) / reach, 1)
                box = f'x="{x:.1f}" y="{top + i * high:.1f}" width="{wide:.1f}" height="{high:.1f}"'
                parts.append(
                    f'<rect class="null" {box}/><rect class="{"c4" if column[row] > 0.5 else "c0"}"'
                    f' fill-opacity="{depth:.2f}" {box}>'
                    f"<title>{text(name)}, {text(row)}: {column[row]:.3f}</title></rect>"
                )
    width, height = math.ceil(left + wide * len(columns)), math.ceil(top + high * len(rows))
    about = f"{caption}: {len(rows)} rows by {len(columns)} columns, up to {far:.2f} from 0.5"
    keys = {f"{0.5 - reach:g}": "c0", "0.5": "null", f"{0.5 + reach:g}": "c4"}
    return (
        f'<figure class="all"><figcaption>{text(caption)}</figcaption><div class="wide" '
        f'tabindex="0"><svg viewBox="0 0 {width} {height}" style="width:{width}px" role="img" '
        f'aria-label="{text(about)}">{"".join(parts)}</svg></div>{legend(keys)}</figure>'
    )


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to seven round numbers, from at or below ``low`` to at or above ``high``."""
    span = (high - low) or max(abs(high), 1)
    power = 10 ** math.floor(math.log10(span / 3))
    step = max(power * next(f for f in (5, 2, 1) if span / (power * f) >= 3), 1 if whole else 0)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        first, last = (first - 1, last) if low > 0 else (first, last + 1)
    return [round(step * i, 12) for i in range(first, last + 1)]

"""Tables: one sheet of cells, written as text, Markdown or CSV, and numbers as people read them."""

from __future__ import annotations

import csv
import io
import math
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONSOLE = 80
"""Characters of a line of a terminal."""
NAME = 24
"""Characters that a name has there; a longer one loses its middle."""
NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}

Results = Mapping[str, Any]
"""As ``summary.summarise`` gives them; a comparison adds ``seconds``, the time of the run."""


@dataclass(frozen=True)
class Sheet:
    """Formatted cells.

    Attributes:
        header: a title a column; ``foot`` sums up ``rows``.
        heads: of two lines, for a page: what a column belongs to and its title there.
        order: columns by how much they matter, the first of them, the names, left out; empty: as
            they stand. A terminal shows as many as it has room for.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    foot: Sequence[Sequence[str]] = ()
    heads: Sequence[tuple[str, str]] = ()
    order: Sequence[int] = ()


@dataclass(frozen=True)
class Column:
    """One number of every client or run: its title and CSV name, and where it is found."""

    title: str
    name: str
    value: Callable[[Mapping[str, Any]], float | None]
    digits: int
    spreads: bool = True
    """How far it varies is worth showing."""
    head: tuple[str, str] = ("", "")
    """On a page, what it belongs to and its title there."""


def label(metric: str) -> str:
    """What people call a metric: ``exact_match`` is exact match."""
    return NAMES.get(metric, metric.replace("_", " "))


def digits_of(metric: str) -> int:
    """Decimals worth showing: losses are nats, all else percent."""
    return 3 if metric == "loss" else 1


def number(value: float | None, digits: int) -> str:
    """The value as a cell; ``-`` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def count(number: int, what: str) -> str:
    """``1 client``, ``2 clients``, ``2 pairs of shoes``."""
    noun, _, rest = what.partition(" ")
    return f"{number} {noun}{'' if number == 1 else 's'} {rest}".rstrip()


def mib(size: float) -> str:
    """Bytes as MiB, to three digits or to a tenth."""
    size /= 2**20
    return f"{size:.1f}" if size >= 100 else f"{size:.3g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: ``34.2 s``, ``12 min 3 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of what is there, or None."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def spread_of(values: Sequence[float], sample: bool = False) -> float:
    """The standard deviation, of all there is or of a ``sample``; a NaN goes through."""
    mean = statistics.fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - sample))


def printable(text: str) -> str:
    """The text without line ends, control characters and broken Unicode."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def deviation(
    values: Iterable[float | None], digits: int, spreads: bool, signed: bool = False
) -> str:
    """``mean ± standard deviation`` of what is there; the mean alone of one value."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    mean = f"{statistics.fmean(there):{'+' if signed else ''}.{digits}f}"
    return f"{mean} ± {spread_of(there, sample=True):.{digits}f}" if spreads and there[1:] else mean


def csv_text(header: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV with a header line; None is an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def sheet_text(sheet: Sheet) -> str:
    """The whole sheet as text, which is Markdown."""
    return table(sheet.header, [*sheet.rows, *sheet.foot])


def console_text(sheet: Sheet) -> str:
    """The sheet for a terminal of 80 characters: long names cut, as many columns as fit."""
    rows = [[shorten(row[0], NAME), *row[1:]] for row in (*sheet.rows, *sheet.foot)]
    columns = list(zip(sheet.header, *rows, strict=True))
    widths = [max(_width(_cell(cell)) for cell in column) + 3 for column in columns]
    chosen, room = [0], CONSOLE - 1 - widths[0]
    for place in sheet.order or range(1, len(columns)):
        if widths[place] <= room:
            chosen.append(place)
            room -= widths[place]
    chosen.sort()
    return table([sheet.header[i] for i in chosen], [[row[i] for i in chosen] for row in rows])


def shorten(name: str, width: int) -> str:
    """A name of at most ``width`` characters; a longer one has an ellipsis in its middle."""
    if _width(name) <= width:
        return name
    head, tail = name, name
    while _width(head) > (width - 1) // 2:
        head = head[:-1]
    while _width(tail) > width - 1 - _width(head):
        tail = tail[1:]
    return f"{head}…{tail}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal: names left, numbers right."""
    lines = [[_cell(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        pads = [" " * (width - _width(c)) for c, width in zip(cells, widths, strict=True)]
        padded = (
            c + pad if i == 0 else pad + c
            for i, (c, pad) in enumerate(zip(cells, pads, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(lines[0]), f"|{rule}|", *map(line, lines[1:])])


def _cell(text: str) -> str:
    """A cell in which a bar begins no column."""
    return text.replace("|", "\\|")


def _width(text: str) -> int:
    """The terminal cells of a text: two for a wide character, none for a combining one."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )

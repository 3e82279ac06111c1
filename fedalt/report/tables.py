"""Tables of clients and of methods: one sheet of cells, written as text, Markdown or CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 120
"""Characters of a terminal; a wider table goes on below itself."""
NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
SECOND = {
    "exact": "exact_match",
    "accuracy": "accuracy",
    "choice": "choice",
    "choice norm": "choice_norm",
}
"""Scores beside the main one that a comparison shows where there are any, by title."""
UNSEEN_TITLE = "unseen clients (rounds are epochs of their fit)"

LOCAL = "local"
"""The method the others must beat: every client alone."""

Client = Mapping[str, Any]
Results = Mapping[str, Any]
"""As ``report.summarise`` gives them; a comparison adds ``seconds``, the time of the run."""


@dataclass(frozen=True)
class Sheet:
    """Formatted cells: ``foot`` sums up ``rows``; columns from ``fold`` on may go below."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    foot: Sequence[Sequence[str]] = ()
    fold: int = 0


@dataclass(frozen=True)
class Column:
    """One number of every client or run: its title and CSV name, and where it is found."""

    title: str
    name: str
    value: Callable[[Mapping[str, Any]], float | None]
    digits: int
    spreads: bool = True
    """How far it varies is worth showing."""


def label(metric: str) -> str:
    """What people call a metric: ``exact_match`` is exact match."""
    return NAMES.get(metric, metric.replace("_", " "))


def digits_of(metric: str) -> int:
    """Decimals worth showing: losses are nats, all else percent."""
    return 3 if metric == "loss" else 1


def number(value: float | None, digits: int) -> str:
    """The value as a cell; ``-`` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def mib(count: float) -> str:
    """Bytes as MiB, to three digits or to a tenth."""
    size = count / 2**20
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


def metrics_in(group: Mapping[str, Any]) -> list[str]:
    """The names of all metrics of a group, in the order they are first met."""
    names = dict.fromkeys(name for row in group["curve"] for name in row)
    return [name for name in names if name not in ("round", "bytes")]


def client_columns(group: Mapping[str, Any], metric: str) -> tuple[list[Column], list[Column]]:
    """The columns of the main metric and those of all else, without the wholly empty ones."""
    parts = any("individual" in client for client in group["clients"].values())
    digits = digits_of(metric)

    def score(title: str, name: str, when: str, which: str, digits: int) -> Column:
        return Column(title, name, lambda client: client.get(when, {}).get(which), digits)

    main = [
        score(f"{label(metric)} base", "base", "base", metric, digits),
        score("individual", "individual", "individual", metric, digits),
        score("RoW", "rest_of_world", "rest_of_world", metric, digits),
        score("mixed" if parts else "last", "last", "last", metric, digits),
        score("best", "best", "best", metric, digits),
        Column("round", "best_round", lambda c: c.get("best", {}).get("round"), 0, spreads=False),
    ]
    rest = [
        score(label(name), name, "last", name, digits_of(name))
        for name in metrics_in(group)
        if name != metric
    ]
    rest.append(Column("gate", "gate", mean_gate, 2))

    def used(columns: list[Column]) -> list[Column]:
        clients = group["clients"].values()
        return [c for c in columns if any(c.value(client) is not None for client in clients)]

    return used(main), used(rest)


def mean_gate(client: Client) -> float | None:
    """The individual adapter's share, averaged over the layers."""
    return mean_of(client.get("gates", {}).values())


def client_sheet(group: Mapping[str, Any], metric: str) -> Sheet:
    """A line a client; below, the mean, the worst client's number and the spread, by column."""
    main, rest = client_columns(group, metric)
    columns, clients = [*main, *rest], group["clients"]
    rows = [
        [printable(name), *(number(column.value(client), column.digits) for column in columns)]
        for name, client in clients.items()
    ]
    foot = [["mean"], ["worst"], ["spread"]]
    for column in columns:
        values = [v for v in map(column.value, clients.values()) if v is not None]
        broken = any(map(math.isnan, values))  # max and min would go by the order
        worst = math.nan if broken else (max if column.name == "loss" else min)(values)
        sums = [statistics.fmean(values), worst, spread_of(values)]
        for line, value in zip(foot, sums, strict=True):
            shown = column.spreads and not (line[0] == "worst" and column.name == "gate")
            line.append(number(value, column.digits) if shown else "")
    return Sheet(["client", *(column.title for column in columns)], rows, foot, 1 + len(main))


def client_table(results: Results) -> str:
    """The known clients' table, and the unseen clients' below where there are any."""
    text = sheet_text(client_sheet(results, results["metric"]))
    return f"{text}\n\n{unseen_table(results)}" if "unseen" in results else text


def unseen_table(results: Results) -> str:
    """The unseen clients' table under its title."""
    return f"{UNSEEN_TITLE}\n\n{sheet_text(client_sheet(results['unseen'], results['metric']))}"


def client_csv(results: Mapping[str, Any]) -> str:
    """A line a client with unrounded numbers; ``sent`` and ``received`` are bytes."""
    groups = [results, results["unseen"]] if "unseen" in results else [results]
    columns = {
        column.name: column
        for group in groups
        for columns in client_columns(group, results["metric"])
        for column in columns
    }
    counts = ("trained_rounds", "refused", "failed", "late", "sent", "received")
    rows = [
        {
            "client": name,
            "unseen": int(group is not results),
            **{column.name: column.value(client) for column in columns.values()},
            **{count: client[count] for count in counts},
        }
        for group in groups
        for name, client in group["clients"].items()
    ]
    return csv_text(["client", "unseen", *columns, *counts], rows)


def measures(runs: Mapping[str, Sequence[Results]]) -> list[Column]:
    """The columns of a comparison, without the wholly empty ones."""
    every = [run for of_method in runs.values() for run in of_method]
    main = every[0]["metric"]

    def score(when: str, name: str) -> Callable[[Results], float | None]:
        return lambda run: run["mean"].get(when, {}).get(name)

    def unseen(run: Results) -> float | None:
        return run["unseen"]["mean"].get("last", {}).get(main) if "unseen" in run else None

    def worst(run: Results) -> float | None:
        return run["worst"]["value"] if run["worst"] else None

    found = [
        Column(f"{label(main)} last", "last", score("last", main), digits_of(main)),
        Column("best", "best", score("best", main), digits_of(main), spreads=False),
        *(
            Column(title, name, score("last", name), 1, spreads=False)
            for title, name in SECOND.items()
            if name != main
        ),
        Column("loss", "loss", score("last", "loss"), 3),
        Column("worst", "worst", worst, digits_of(main)),
        Column("spread", "spread", lambda run: run["spread"], digits_of(main), spreads=False),
        Column("unseen", "unseen", unseen, digits_of(main)),
        Column("seconds", "seconds", lambda run: run.get("seconds"), 1, spreads=False),
        Column("MiB", "mib", lambda run: sum(run["traffic"].values()) / 2**20, 2, spreads=False),
    ]
    return [m for m in found if any(m.value(run) is not None for run in every)]


def compare_sheet(runs: Mapping[str, Sequence[Results]]) -> Sheet:
    """A line a method: means over the seeds, with the standard deviation of the main ones."""
    columns = measures(runs)
    rows = [
        [
            name,
            *(deviation(map(m.value, results), m.digits, m.spreads) for m in columns),
            "-" if name == LOCAL else "/".join(map(str, wins(results, runs.get(LOCAL, ())))) or "-",
        ]
        for name, results in runs.items()
    ]
    return Sheet(["method", *(m.title for m in columns), "wins"], rows)


def wins(results: Sequence[Results], local: Sequence[Results]) -> tuple[int, int] | tuple[()]:
    """Clients above what they reach alone, and all clients, over the seeds that both have."""
    pairs = [
        (client["last"][run["metric"]], alone["clients"][name]["last"][run["metric"]])
        for run, alone in zip(results, local, strict=False)
        for name, client in run["clients"].items()
        if all(
            run["metric"] in side["clients"].get(name, {}).get("last", {}) for side in (run, alone)
        )
    ]
    return (sum(own > other for own, other in pairs), len(pairs)) if pairs else ()


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
    """The sheet as text; where it is too wide for a terminal, in two tables."""
    whole = table(sheet.header, [*sheet.rows, *sheet.foot])
    if not sheet.fold or _width(whole.partition("\n")[0]) <= WIDTH:
        return whole
    first, second = slice(sheet.fold), slice(sheet.fold, None)
    rows = [*sheet.rows, *sheet.foot]
    lower = table(
        [sheet.header[0], *sheet.header[second]], [[row[0], *row[second]] for row in rows]
    )
    return f"{table(sheet.header[first], [row[first] for row in rows])}\n\n{lower}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal: names left, numbers right."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
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


def _width(text: str) -> int:
    """The terminal cells of a text: two for a wide character, none for a combining one."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )

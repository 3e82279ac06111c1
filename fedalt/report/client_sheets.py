"""The tables of a run's clients: for a page, a terminal, Markdown and CSV."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from fedalt.report.tables import (
    Column,
    Results,
    Sheet,
    console_text,
    csv_text,
    digits_of,
    label,
    mean_of,
    number,
    printable,
    sheet_text,
    spread_of,
)

UNSEEN_TITLE = "unseen clients (rounds are epochs of their fit)"
MATTER = "base individual rest_of_world last epsilon best best_round gate loss low high".split()
"""Columns that a terminal shows first, where it has not room for all."""

Client = Mapping[str, Any]
Value = Callable[[Client], float | None]


def metrics_in(group: Mapping[str, Any]) -> list[str]:
    """The names of all metrics of a group, in the order they are first met."""
    names = dict.fromkeys(name for row in group["curve"] for name in row)
    return [name for name in names if name not in ("round", "bytes")]


def has_parts(group: Mapping[str, Any]) -> bool:
    """Whether two adapters were scored alone, so that the last score is that of their mix."""
    return any("individual" in client for client in group["clients"].values())


def client_columns(group: Mapping[str, Any], metric: str) -> list[Column]:
    """The columns of the main metric and those of all else, without the wholly empty ones."""
    main, digits, last = label(metric), digits_of(metric), "mixed" if has_parts(group) else "last"

    def score(title: str, name: str, which: str, head: tuple[str, str]) -> Column:
        def value(client: Client) -> float | None:
            return client.get(name, {}).get(which)

        return Column(title, name, value, digits_of(which), head=head)

    def other(name: str) -> Column:
        return Column(
            label(name),
            name,
            lambda client: client.get("last", {}).get(name),
            digits_of(name),
            head=("last round", label(name)),
        )

    def single(title: str, name: str, value: Value, digits: int, head: tuple[str, str]) -> Column:
        return Column(title, name, value, digits, spreads=False, head=head)

    sure, records, best = "95 % interval", "records", f"best {main}"
    columns = [
        score(f"{main} base", "base", metric, (main, "base")),
        score("individual", "individual", metric, (main, "individual alone")),
        score("RoW", "rest_of_world", metric, (main, "RoW alone")),
        score(last, "last", metric, (main, last)),
        single("95 % from", "low", lambda c: c.get("interval", (None,))[0], digits, (sure, "from")),
        single("to", "high", lambda c: c.get("interval", (None,))[-1], digits, (sure, "to")),
        score("best", "best", metric, (best, "score")),
        single("round", "best_round", lambda c: c.get("best", {}).get("round"), 0, (best, "round")),
        *(other(name) for name in metrics_in(group) if name != metric),
        single("epsilon", "epsilon", lambda c: c.get("epsilon"), 2, ("privacy", "epsilon")),
        Column("gate", "gate", mean_gate, 2, head=("mixer", "gate")),
        single(
            "train", "train", lambda c: c.get("records", {}).get("train"), 0, (records, "train")
        ),
        single("test", "test", lambda c: c.get("records", {}).get("test"), 0, (records, "test")),
    ]
    clients = group["clients"].values()
    return [c for c in columns if any(c.value(client) is not None for client in clients)]


def mean_gate(client: Client) -> float | None:
    """The individual adapter's share, averaged over the layers."""
    return mean_of(client.get("gates", {}).values())


def client_sheet(group: Mapping[str, Any], metric: str) -> Sheet:
    """A line a client; below, the mean, the worst client's number and the spread, by column."""
    columns, clients = client_columns(group, metric), group["clients"]
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
    names = [column.name for column in columns]
    return Sheet(
        ["client", *(column.title for column in columns)],
        rows,
        foot,
        heads=[("", "client"), *(column.head for column in columns)],
        order=[1 + names.index(name) for name in dict.fromkeys((*MATTER, *names)) if name in names],
    )


def client_table(results: Results, written: Callable[[Sheet], str] = sheet_text) -> str:
    """The known clients' table, and the unseen clients' below where there are any.

    ``written`` is ``console_text`` for a terminal.
    """
    text = written(client_sheet(results, results["metric"]))
    return f"{text}\n\n{unseen_table(results, written)}" if "unseen" in results else text


def unseen_table(results: Results, written: Callable[[Sheet], str] = console_text) -> str:
    """The unseen clients' table under its title."""
    return f"{UNSEEN_TITLE}\n\n{written(client_sheet(results['unseen'], results['metric']))}"


def client_csv(results: Mapping[str, Any]) -> str:
    """A line a client with unrounded numbers; ``sent`` and ``received`` are bytes."""
    groups = [results, results["unseen"]] if "unseen" in results else [results]
    columns = {
        column.name: column
        for group in groups
        for column in client_columns(group, results["metric"])
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

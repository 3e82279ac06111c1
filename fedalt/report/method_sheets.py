"""The tables of a comparison's methods: for a page, a terminal, Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fedalt.report.tables import (
    Column,
    Results,
    Sheet,
    csv_text,
    deviation,
    digits_of,
    label,
    sheet_text,
)

Runs = Mapping[str, Sequence[Results]]
"""The results of every method, in the order of the seeds."""
Value = Callable[[Results], float | None]

SECOND = {
    "exact": "exact_match",
    "accuracy": "accuracy",
    "choice": "choice",
    "choice norm": "choice_norm",
}
"""Scores beside the main one that a comparison shows where there are any, by title."""

CLIENTS = "clients"
MATTER = "last wins worst loss".split()
"""Columns that a terminal shows first, where it has not room for all."""

LOCAL = "local"
"""The method the others must beat: every client alone."""


def measures(runs: Runs) -> list[Column]:
    """The columns of a comparison, without the wholly empty ones."""
    every = [run for of_method in runs.values() for run in of_method]
    main = every[0]["metric"]

    def score(when: str, name: str) -> Value:
        return lambda run: run["mean"].get(when, {}).get(name)

    def unseen(run: Results) -> float | None:
        return run["unseen"]["mean"].get("last", {}).get(main) if "unseen" in run else None

    def worst(run: Results) -> float | None:
        return run["worst"]["value"] if run["worst"] else None

    def column(group: str, head: str, name: str, value: Value, digits: int, sd: bool) -> Column:
        title = f"{label(main)} last" if name == "last" else head
        return Column(title, name, value, digits, sd, (group, head))

    def moved(run: Results) -> float:
        return sum(run["traffic"].values()) / 2**20

    score_of, rest, digits = label(main), "last round", digits_of(main)
    found = [
        column(score_of, "last", "last", score("last", main), digits, True),
        column(score_of, "best", "best", score("best", main), digits, False),
        *(
            column(rest, title, name, score("last", name), 1, False)
            for title, name in SECOND.items()
            if name != main
        ),
        column(rest, "loss", "loss", score("last", "loss"), 3, True),
        column(CLIENTS, "worst", "worst", worst, digits, True),
        column(CLIENTS, "spread", "spread", lambda run: run["spread"], digits, False),
        column(CLIENTS, "unseen", "unseen", unseen, digits, True),
        column("cost", "seconds", "seconds", lambda run: run.get("seconds"), 1, False),
        column("cost", "MiB", "mib", moved, 2, False),
    ]
    return [m for m in found if any(m.value(run) is not None for run in every)]


def compare_sheet(runs: Runs) -> Sheet:
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
    names = [*(m.name for m in columns), "wins"]
    return Sheet(
        ["method", *(m.title for m in columns), "wins"],
        rows,
        heads=[("", "method"), *(m.head for m in columns), (f"above {LOCAL}", "wins")],
        order=[1 + names.index(name) for name in dict.fromkeys((*MATTER, *names)) if name in names],
    )


def wins(results: Sequence[Results], local: Sequence[Results]) -> tuple[int, int] | tuple[()]:
    """Clients above what they reach alone, and all clients, over the seeds that both have."""
    found = pairs(results, local)
    return (sum(own > other for own, other in found), len(found)) if found else ()


def pairs(results: Sequence[Results], local: Sequence[Results]) -> list[tuple[float, float]]:
    """The last main score of every client and seed that both have, and what it is in ``local``."""
    return [
        (client["last"][run["metric"]], alone["clients"][name]["last"][run["metric"]])
        for run, alone in zip(results, local, strict=False)
        for name, client in run["clients"].items()
        if all(
            run["metric"] in side["clients"].get(name, {}).get("last", {}) for side in (run, alone)
        )
    ]


def seed_sheet(runs: Runs, seeds: Sequence[int]) -> Sheet | None:
    """The main metric of ``local`` by seed, and what every other method adds to it; or None."""
    others = [name for name in runs if name != LOCAL]
    if LOCAL not in runs or not others:
        return None
    main = runs[LOCAL][0]["metric"]
    digits = digits_of(main)

    def last(name: str) -> list[float]:
        return [run["mean"].get("last", {}).get(main, math.nan) for run in runs[name]]

    alone = last(LOCAL)
    rows = [[LOCAL, *(f"{value:.{digits}f}" for value in alone), deviation(alone, digits, True)]]
    for name in others:
        added = [own - base for own, base in zip(last(name), alone, strict=True)]
        cells = (f"{value:+.{digits}f}" for value in added)
        rows.append([f"{name} - {LOCAL}", *cells, deviation(added, digits, True, True)])
    order = [1 + len(seeds), *range(1, 1 + len(seeds))]
    return Sheet([f"{label(main)} by seed", *map(str, seeds), "mean"], rows, order=order)


def compare_csv(runs: Runs, seeds: Sequence[int]) -> str:
    """A line a run with unrounded numbers; ``wins`` of ``pairs`` clients are above local."""
    columns = measures(runs)
    rows = []
    for name, results in runs.items():
        for index, (seed, run) in enumerate(zip(seeds, results, strict=True)):
            row = {"method": name, "seed": seed, **{m.name: m.value(run) for m in columns}}
            won = wins([run], runs.get(LOCAL, ())[index : index + 1]) if name != LOCAL else ()
            rows.append(row | dict(zip(("wins", "pairs"), won, strict=False)))
    return csv_text(["method", "seed", *(m.name for m in columns), "wins", "pairs"], rows)


def compare_table(
    runs: Runs, seeds: Sequence[int], written: Callable[[Sheet], str] = sheet_text
) -> str:
    """The methods' table and, where ``local`` is among them, the differences from it by seed.

    ``written`` is ``console_text`` for a terminal.
    """
    text = written(compare_sheet(runs))
    by_seed = seed_sheet(runs, seeds)
    return f"{text}\n\n{written(by_seed)}" if by_seed else text

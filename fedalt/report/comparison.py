"""The page of a comparison: tables of the methods, their curves, what each client reaches."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fedalt.report import charts, page, words
from fedalt.report.charts import Line
from fedalt.report.events import Event
from fedalt.report.facts import facts_of_comparison, settings_in
from fedalt.report.method_sheets import Runs, compare_sheet, seed_sheet
from fedalt.report.page import section
from fedalt.report.tables import Results, Sheet, digits_of, label, mean_of, number


def compare_page(
    title: str, runs: Runs, seeds: Sequence[int], config: str, times: Sequence[Event] = ()
) -> str:
    """The tables, and the methods' curves by round and by what they sent and received.

    Args:
        title: of the page.
        runs: of every method, a run a seed.
        seeds: in the runs' order.
        config: of all runs, as YAML.
        times: the rows of the runs' ``times.jsonl``.
    """
    first = next(iter(runs.values()))[0]
    main = first["metric"]
    clients = {name: _client_means(results, main) for name, results in runs.items()}
    names = dict.fromkeys(client for own in clients.values() for client in own)
    by_client = [
        [client, *(number(own.get(client), digits_of(main)) for own in clients.values())]
        for client in names
    ]
    by_seed = seed_sheet(runs, seeds)
    by_round = [
        charts.line_chart(f"{label(metric)} by round", "round", _lines(runs, "round", metric))
        for metric in dict.fromkeys((main, "loss"))
    ]
    price = charts.line_chart(
        f"{label(main)} by MiB sent and received so far", "MiB", _lines(runs, "bytes", main)
    )
    sections = [
        section(
            "Methods",
            page.sheet_html(compare_sheet(runs)),
            page.named("terms", words.method_terms(runs)),
        ),
        section("By seed", page.sheet_html(by_seed)) if by_seed else "",
        section("Curves, mean of seeds and clients", page.figures(*by_round, price)),
        section(
            f"{label(main)} by client, mean of seeds",
            page.sheet_html(Sheet(["client", *runs], by_client)),
        ),
    ]
    facts = facts_of_comparison(runs, seeds, times, settings_in(config))
    return page.document(title, words.method_verdict(runs, seeds), facts, sections, config)


def _client_means(results: Sequence[Results], metric: str) -> dict[str, float | None]:
    """By client, the mean over the seeds of its last score."""
    names = dict.fromkeys(name for run in results for name in run["clients"])
    return {
        name: mean_of(run["clients"].get(name, {}).get("last", {}).get(metric) for run in results)
        for name in names
    }


def _lines(runs: Runs, across: str, metric: str) -> list[Line]:
    """A line a method: the mean over the seeds, at the rounds that all of them reached.

    Args:
        runs: of every method.
        across: ``round`` or ``bytes``; the latter are drawn as MiB, if anything was sent at all.
        metric: what goes up.
    """
    lines = []
    for i, (name, results) in enumerate(runs.items()):
        curves = [{row["round"]: row for row in run["curve"] if metric in row} for run in results]
        rounds = sorted(set[int].intersection(*(set(curve) for curve in curves)))
        points: list[tuple[float, float]] = []
        for at in rounds:
            bytes_moved = statistics.fmean(curve[at]["bytes"] for curve in curves)
            score = statistics.fmean(curve[at][metric] for curve in curves)
            points.append((at if across == "round" else bytes_moved / 2**20, score))
        style = f"c{i % charts.FEW}" + (" dashed" if i >= charts.FEW else "")
        lines.append(Line(name, points, style))
    moved = across == "round" or any(x > 0 for line in lines for x, _ in line.points)
    return lines if moved else []

"""The report of a finished or running run: its tables and its page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedalt.report import charts, page, tables, words
from fedalt.report.charts import Line
from fedalt.report.client_sheets import UNSEEN_TITLE, client_csv, client_sheet, client_table
from fedalt.report.events import Event, read_events_of, read_times
from fedalt.report.facts import facts_of_run, settings_in
from fedalt.report.page import section
from fedalt.report.summary import FAULTS, read_results
from fedalt.report.tables import Results, Sheet

PHASES = "start train combine evaluate save"


def write_report(run_dir: Path, title: str) -> tuple[str, Path]:
    """Tables and page of a finished or running run: ``report/clients.md``, ``.csv``, ``.html``.

    Returns:
        For a terminal, the table of clients and the verdict; and the path of
        ``report/report.html``.

    Raises:
        InputError: no client has been scored yet, or the events are damaged.
    """
    results = read_results(run_dir)
    config = run_dir / "config.yaml"
    settings = config.read_text(encoding="utf-8") if config.exists() else ""
    finished = (run_dir / "results.json").exists()
    times = read_times(run_dir / "times.jsonl")
    answers = answers_in(read_events_of(run_dir))
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    contents = {
        "clients.md": client_table(results) + "\n",
        "clients.csv": client_csv(results),
        "report.html": run_page(title, results, times, settings, finished, answers),
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8", errors="backslashreplace")
    verdict = words.verdict(results, str(settings_in(settings).get("method", "")), finished)
    table = client_table(results, tables.console_text)
    return f"{table}\n\n{words.wrapped(verdict)}", folder / "report.html"


def answers_in(events: Iterable[Event]) -> dict[str, dict[int, Event]]:
    """By client and round, the questions that were kept with their answers."""
    answers: dict[str, dict[int, Event]] = defaultdict(dict)
    for event in events:
        if event["event"] == "answers":
            answers[event["client"]][event["round"]] = event
    return answers


def run_page(
    title: str,
    results: Results,
    times: Sequence[Event],
    config: str,
    finished: bool,
    answers: Mapping[str, Mapping[int, Event]] | None = None,
) -> str:
    """The page of a run: what it was and reached, how, at what cost, and what went wrong."""
    metric, settings = results["metric"], settings_in(config)
    unseen, traffic = results.get("unseen"), results["traffic"]
    moved = sum(traffic.values())
    price = [(r["bytes"] / 2**20, r[metric]) for r in results["curve"] if moved and metric in r]
    caption = f"mean {tables.label(metric)} by MiB sent and received so far"
    kind = settings.get("data", {}).get("kind", "text")
    last = "mixed" if any("gates" in c for c in results["clients"].values()) else "trained"
    sections = [
        section(
            "Clients",
            page.sheet_html(client_sheet(results, metric)),
            page.named("terms", words.terms(results, kind)),
        ),
        section(
            "Curves",
            page.figures(
                *_curves(results, metric, "round"),
                charts.line_chart(caption, "MiB", [Line("mean", price, "mean")]),
            ),
        ),
        section("Gates", page.figures(_gates(results))),
        section("Questions and answers", *_questions(answers or {}, last)),
        section(
            UNSEEN_TITLE.capitalize(),
            page.sheet_html(client_sheet(unseen, metric)),
            page.figures(*_curves(unseen, metric, "epoch"), _gates(unseen)),
        )
        if unseen
        else "",
        section("Time", *_time_parts(times)),
        section("Refused, failed and late updates", _faults(results["faults"])),
    ]
    verdict = words.verdict(results, str(settings.get("method", "")), finished)
    facts = facts_of_run(results, times, settings, finished)
    return page.document(title, verdict, facts, sections, config)


def _curves(group: Mapping[str, Any], metric: str, turn: str) -> list[str]:
    """A chart of the main metric and one of the loss, a line a client."""
    thin = ", a thin line a client" if len(group["clients"]) > charts.FEW else ""
    return [
        charts.line_chart(f"{tables.label(name)} by {turn}{thin}", turn, _client_lines(group, name))
        for name in dict.fromkeys((metric, "loss"))
    ]


def _client_lines(group: Mapping[str, Any], metric: str) -> list[Line]:
    """Few clients in a colour each; many as thin lines, the worst one and the mean on top."""
    curves = {
        name: [(row["round"], row[metric]) for row in client["curve"] if metric in row]
        for name, client in group["clients"].items()
    }
    few = len(curves) <= charts.FEW
    lines = [
        Line(name, points, f"c{i}" if few else "thin", named=few)
        for i, (name, points) in enumerate(curves.items())
    ]
    if not few and group["worst"]:
        worst = group["worst"]["client"]
        lines.append(Line(f"worst: {worst}", curves[worst], "worst"))
    means = [(row["round"], row[metric]) for row in group["curve"] if metric in row]
    return [*lines, Line("mean", means, "mean")] if len(curves) > 1 else lines


def _gates(group: Mapping[str, Any]) -> str:
    gates = {name: c["gates"] for name, c in group["clients"].items() if c.get("gates")}
    caption = "mean gate of the individual adapter; the rest is Rest-of-World's"
    return charts.heat_map(caption, gates, ("more Rest-of-World", "more individual"))


def _questions(answers: Mapping[str, Mapping[int, Event]], last: str) -> list[str]:
    """A client's questions in a table that opens by a click; the first one's is open.

    Its answers are those of round 0 and of the last round (of a newcomer: epoch) kept.
    """
    return [
        page.folded(client, _answers(own, last), unfolded=place == 0)
        for place, (client, own) in enumerate(answers.items())
    ]


def _answers(rounds: Mapping[int, Event], last: str) -> str:
    """Question, right answer, and the answer of every kept round."""
    header = ["question", "right answer"]
    header += [f"base (round {n})" if n == 0 else f"{last} (round {n})" for n in sorted(rounds)]
    shown = [rounds[number]["shown"] for number in sorted(rounds)]
    rows = [
        [same[0]["asked"], same[0]["gold"], *(answer["given"] for answer in same)]
        for same in zip(*shown, strict=True)
    ]
    return page.sheet_html(Sheet(header, rows), words=True)


def _time_parts(times: Sequence[Event]) -> list[str]:
    """Seconds by phase in all, and by round."""
    phases: dict[str, float] = defaultdict(float)
    rounds: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in sorted(times, key=lambda row: (PHASES.find(row["phase"]), row["phase"])):
        phases[row["phase"]] += row["seconds"]
        rounds[row["round"]][row["phase"]] += row["seconds"]
    whole = sum(phases.values()) or 1.0
    rows = [[name, f"{took:.1f}", f"{100 * took / whole:.0f} %"] for name, took in phases.items()]
    chart = charts.stacked_bars("seconds by round and phase", "round", rounds, list(phases))
    sheet = Sheet(["phase", "seconds", "share"], rows)
    return [page.sheet_html(sheet), page.figures(chart)] if rows else []


def _faults(faults: Sequence[Event]) -> str:
    rows = [[str(f["round"]), f["client"] or "-", FAULTS[f["event"]], f["reason"]] for f in faults]
    sheet = Sheet(["round", "client", "what", "reason"], rows)
    return page.sheet_html(sheet, words=True) if rows else "<p>none</p>"

"""What a run did: events in, results out, and the report of a finished or running run."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedalt.errors import InputError
from fedalt.report import page, tables
from fedalt.report.page import Line, section

Event = Mapping[str, Any]
FAULTS = {"refuse": "refused", "fail": "failed", "late": "late", "thin": "too few clients"}
PHASES = "train combine evaluate save"
ABOUT = ("event", "round", "client", "part", "unseen")
PARTS = ("individual", "rest_of_world")


def read_events(path: Path) -> list[Event]:
    """The events of a ``metrics.jsonl``; a last line cut short by a kill is passed over.

    Raises:
        InputError: an earlier line is damaged.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    events = []
    for index, line in enumerate(lines):
        try:
            events.append(json.loads(line))
        except ValueError:
            cure = "remove that line to report on the rest"
            raise InputError(f"{path}:{index + 1}: broken JSON; {cure}") from None
    return events


def read_events_of(run_dir: Path) -> list[Event]:
    """A run's own events, then those of the clients that joined it, each from its own file."""
    joined = sorted((run_dir / "joined").glob("[!.]*.jsonl"))
    return [event for path in (run_dir / "metrics.jsonl", *joined) for event in read_events(path)]


def read_times(path: Path) -> list[Event]:
    """The lines of a ``times.jsonl``; of a round done twice, after a kill, the later ones."""
    rows = {(row["round"], row["phase"], row["client"]): row for row in read_events(path)}
    return list(rows.values())


def read_results(run_dir: Path) -> dict[str, Any]:
    """The results of a finished or running run; ``InputError`` before anything is scored."""
    results = summarise(read_events_of(run_dir))
    if not results["metric"]:
        raise InputError(f"{run_dir}: nothing is scored yet; wait for round 0 to finish")
    return results


def summarise(events: Iterable[Event]) -> dict[str, Any]:
    """``results.json``: scores in percent, losses in nats (a token, or an image), traffic in bytes.

    Returns:
        ``metric``, the main one; ``round``, the last evaluated; ``clients`` by id, each with
        ``base`` (round 0), ``last``, ``best`` (by the main metric), ``curve``, the two adapters
        alone (``individual``, ``rest_of_world``), ``gates`` by layer, ``micro_batch`` where no
        whole batch was run at once, and counts; ``mean`` of each over the clients; ``worst`` and
        ``spread`` (population standard deviation) of the last main metric; ``curve``, the means
        and the bytes moved so far by round; ``traffic``; ``faults``; and ``unseen``, the same of
        clients that took no part. A key that has nothing to hold is absent from its client.
    """
    known: dict[str, list[Event]] = defaultdict(list)
    unseen: dict[str, list[Event]] = defaultdict(list)
    faults, joined, main = [], set(), ""
    for event in events:
        kind, client = event["event"], event.get("client", "")
        if kind in FAULTS:
            fault = {"round": event["round"], "client": client, "event": kind}
            faults.append({**fault, "reason": event.get("reason", "")})
        elif kind == "join":
            joined.add(client)
        elif kind == "evaluate" and not main:
            main = next(iter(metrics_of(event)), "")
        if client:
            (unseen if event.get("unseen") or client in joined else known)[client].append(event)
    results = {"metric": main, **_group(known, main)}
    if unseen:
        results["unseen"] = _group(unseen, main)
    return {**results, "faults": faults}


def metrics_of(event: Event) -> dict[str, float]:
    """The numbers of an event that are scores."""
    return {k: v for k, v in event.items() if k not in ABOUT and isinstance(v, int | float)}


def write_report(run_dir: Path, title: str) -> tuple[str, Path]:
    """Tables and page of a finished or running run: ``report/clients.md``, ``.csv``, ``.html``.

    Returns:
        The table of clients as text, and the path of ``report/report.html``.

    Raises:
        InputError: no client has been scored yet, or the events are damaged.
    """
    results = read_results(run_dir)
    config = run_dir / "config.yaml"
    settings = config.read_text(encoding="utf-8") if config.exists() else ""
    finished = (run_dir / "results.json").exists()
    html = run_page(title, results, read_times(run_dir / "times.jsonl"), settings, finished)
    table, folder = tables.client_table(results), run_dir / "report"
    folder.mkdir(exist_ok=True)
    contents = {
        "clients.md": table + "\n",
        "clients.csv": tables.client_csv(results),
        "report.html": html,
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8", errors="backslashreplace")
    return table, folder / "report.html"


def run_page(
    title: str, results: Mapping[str, Any], times: Sequence[Event], config: str, finished: bool
) -> str:
    """The page of a run: what it reached, how, at what cost, and what went wrong."""
    metric, mean, traffic = results["metric"], results["mean"], results["traffic"]
    ends = (tables.number(mean.get(when, {}).get(metric), 1) for when in ("base", "last"))
    unseen = results.get("unseen")
    facts = {
        "clients": str(len(results["clients"])),
        "rounds": str(results["round"]) if finished else f"{results['round']} so far",
        f"mean {tables.label(metric)}": " → ".join(ends),
        "time": tables.duration(sum(row["seconds"] for row in times)) if times else "-",
        "sent by clients": f"{tables.mib(traffic['sent'])} MiB",
        "received by clients": f"{tables.mib(traffic['received'])} MiB",
    }
    if parts := [c["micro_batch"] for c in results["clients"].values() if "micro_batch" in c]:
        facts["examples run at once"] = str(min(parts))
    moved = sum(traffic.values())
    price = [(r["bytes"] / 2**20, r[metric]) for r in results["curve"] if moved and metric in r]
    caption = f"mean {tables.label(metric)} by MiB sent and received so far"
    sections = [
        section("Clients", page.sheet_html(tables.client_sheet(results, metric))),
        section(
            "Curves",
            page.figures(
                *_curves(results, metric, "round"),
                page.line_chart(caption, "MiB", [Line("mean", price, "mean", in_legend=False)]),
            ),
        ),
        section("Gates", page.figures(_gates(results))),
        section(
            tables.UNSEEN_TITLE.capitalize(),
            page.sheet_html(tables.client_sheet(unseen, metric)),
            page.figures(*_curves(unseen, metric, "epoch"), _gates(unseen)),
        )
        if unseen
        else "",
        section("Time", *_time_parts(times)),
        section("Refused, failed and late updates", _faults(results["faults"])),
    ]
    return page.document(title, facts, sections, config)


def _curves(group: Mapping[str, Any], metric: str, turn: str) -> list[str]:
    """A chart of the main metric and one of the loss, a line a client."""
    return [
        page.line_chart(f"{tables.label(name)} by {turn}", turn, _client_lines(group, name))
        for name in dict.fromkeys((metric, "loss"))
    ]


def _client_lines(group: Mapping[str, Any], metric: str) -> list[Line]:
    """Few clients in a colour each; many as thin lines, the worst one and the mean on top."""
    curves = {
        name: [(row["round"], row[metric]) for row in client["curve"] if metric in row]
        for name, client in group["clients"].items()
    }
    few = len(curves) <= page.FEW
    lines = [
        Line(name, points, f"c{i}" if few else "thin", in_legend=few)
        for i, (name, points) in enumerate(curves.items())
    ]
    if not few:
        lines.insert(0, Line("one client", [], "thin"))
        if group["worst"]:
            worst = group["worst"]["client"]
            lines.append(Line(f"worst: {worst}", curves[worst], "worst"))
    means = [(row["round"], row[metric]) for row in group["curve"] if metric in row]
    return [*lines, Line("mean of all clients", means, "mean")] if len(curves) > 1 else lines


def _gates(group: Mapping[str, Any]) -> str:
    gates = {name: c["gates"] for name, c in group["clients"].items() if c.get("gates")}
    return page.heat_map("mean gate of the individual adapter; the rest is Rest-of-World's", gates)


def _time_parts(times: Sequence[Event]) -> list[str]:
    """Seconds by phase in all, and by round."""
    phases: dict[str, float] = defaultdict(float)
    rounds: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in sorted(times, key=lambda row: (PHASES.find(row["phase"]), row["phase"])):
        phases[row["phase"]] += row["seconds"]
        rounds[row["round"]][row["phase"]] += row["seconds"]
    whole = sum(phases.values()) or 1.0
    rows = [[name, f"{took:.1f}", f"{100 * took / whole:.0f} %"] for name, took in phases.items()]
    chart = page.stacked_bars("seconds by round and phase", "round", rounds)
    sheet = tables.Sheet(["phase", "seconds", "share"], rows)
    return [page.sheet_html(sheet), page.figures(chart)] if rows else []


def _faults(faults: Sequence[Event]) -> str:
    rows = [[str(f["round"]), f["client"] or "-", FAULTS[f["event"]], f["reason"]] for f in faults]
    sheet = tables.Sheet(["round", "client", "what", "reason"], rows)
    return page.sheet_html(sheet, words=True) if rows else "<p>none</p>"


def _group(events: Mapping[str, Sequence[Event]], main: str) -> dict[str, Any]:
    """Known or unseen clients, and what they have in common."""
    clients = {name: _client(own, main) for name, own in events.items()}
    mean = {
        when: _means([client[when] for client in clients.values() if when in client])
        for when in ("base", "last", "best", *PARTS)
    }
    lasts = {name: c["last"][main] for name, c in clients.items() if main in c.get("last", {})}
    worst = min(lasts, key=lambda name: _rank(lasts[name])) if lasts else None
    return {
        "round": max((c["last"]["round"] for c in clients.values() if "last" in c), default=0),
        "clients": clients,
        "mean": {when: scores for when, scores in mean.items() if scores},
        "worst": {"client": worst, "value": lasts[worst]} if worst is not None else None,
        "spread": tables.spread_of(list(lasts.values())) if lasts else None,
        "curve": _mean_curve(clients, [event for own in events.values() for event in own]),
        "traffic": {way: sum(c[way] for c in clients.values()) for way in ("sent", "received")},
    }


def _client(events: Sequence[Event], main: str) -> dict[str, Any]:
    """One client, from its own events."""
    kinds: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        kinds[event["event"]].append(event)
    rows = {e["round"]: {"round": e["round"], **metrics_of(e)} for e in kinds["evaluate"]}
    client: dict[str, Any] = {"curve": [rows[number] for number in sorted(rows)]}
    if 0 in rows:
        client["base"] = rows[0]
    if rows:
        client["last"] = client["curve"][-1]
        client["best"] = max(client["curve"], key=lambda row: _rank(row.get(main)))
    for event in kinds["part"]:
        if event["part"] in PARTS:
            client[event["part"]] = metrics_of(event)
    for event in kinds["gates"]:
        client["gates"] = dict(event["layers"])
    if parts := [event["micro_batch"] for event in kinds["train"] if "micro_batch" in event]:
        client["micro_batch"] = parts[-1]
    return {
        **client,
        "trained_rounds": len({event["round"] for event in kinds["train"]}),
        "refused": len(kinds["refuse"]),
        "failed": len(kinds["fail"]),
        "late": len(kinds["late"]),
        **{way: sum(event[way] for event in kinds["traffic"]) for way in ("sent", "received")},
    }


def _mean_curve(clients: Mapping[str, Any], events: Iterable[Event]) -> list[dict[str, Any]]:
    """By evaluated round, the mean of every client's latest scores and the bytes moved so far.

    Latest, not only that round's: a round that is still being scored, or that scores a part of
    the clients, would else jump to the mean of those few.
    """
    moved: dict[int, int] = defaultdict(int)
    for event in events:
        if event["event"] == "traffic":
            moved[event["round"]] += event["sent"] + event["received"]
    by_round: dict[int, dict[str, Any]] = defaultdict(dict)
    for name, client in clients.items():
        for row in client["curve"]:
            by_round[row["round"]][name] = row
    latest: dict[str, Any] = {}
    curve = []
    for number in sorted(by_round):
        latest |= by_round[number]
        so_far = sum(count for when, count in moved.items() if when <= number)
        curve.append({"round": number, "bytes": so_far, **_means(list(latest.values()))})
    return curve


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every metric over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row if name != "round")
    return {name: statistics.fmean(row[name] for row in rows if name in row) for name in names}


def _rank(value: float | None) -> float:
    """For comparisons: a score that is missing or not a number is below all others."""
    return -math.inf if value is None or math.isnan(value) else value

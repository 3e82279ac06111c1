"""Events in, results out: what ``results.json`` holds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedalt.errors import InputError
from fedalt.report import tables
from fedalt.report.events import Event, metrics_of, read_events_of
from fedalt.report.intervals import interval

FAULTS = {"refuse": "refused", "fail": "failed", "late": "late", "thin": "too few clients"} | {
    "spent": "privacy spent"
}
PARTS = ("individual", "rest_of_world")


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
        whole batch was run at once, ``records`` (how many train and test), ``interval`` (the two
        ends of the last main score's 95 % interval), and counts; ``mean`` of each over the clients;
        ``worst`` and ``spread`` (population standard deviation) of the last main metric; ``curve``,
        the means and the bytes moved so far by round; ``traffic``; ``faults``; and ``unseen``, the
        same of clients that took no part. A key that has nothing to hold is absent from its client.
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
    for event in kinds["privacy"]:
        client["epsilon"] = event["epsilon"]
    for event in kinds["answers"]:
        client["records"] = {"train": event["train"], "test": event["test"]}
        last = client.get("last", {})
        if main in last and event["round"] == last["round"]:
            ends = interval(main, last[main], event["test"], event.get("scores", ()))
            client |= {"interval": ends} if ends else {}
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

"""What one round has to tell a tracker, read from what the journal wrote of it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from fedalt.report.events import read_events, read_times
from fedalt.report.tensorboard import scalars_of

FEDERATION = "federation"
"""The run that has the means and sums over clients; a client's is ``client-ID``."""
MEANS, SUMS = ("train", "test", "individual", "rest_of_world"), ("traffic", "seconds")


def points_of(run_dir: Path, first: int, last: int) -> dict[int, dict[str, dict[str, float]]]:
    """The values of the rounds ``first`` to ``last``: by round, then by run, then by tag.

    Losses and scores of the federation are the means of its clients' in that round, bytes and
    seconds the sums. ``seconds/all`` is what all that is timed took.
    """
    told: dict[int, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    over: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in read_events(run_dir / "metrics.jsonl"):
        number = event["round"]
        if first <= number <= last and event["client"] and not event.get("unseen"):
            for tag, value, _ in scalars_of(event):
                told[number][f"client-{event['client']}"][tag] = value
                over[number][tag].append(value)
    for row in read_times(run_dir / "times.jsonl"):
        number, tag = row["round"], f"seconds/{row['phase']}"
        if first <= number <= last:
            if row["client"]:
                told[number][f"client-{row['client']}"][tag] = row["seconds"]
            over[number][tag].append(row["seconds"])
            over[number]["seconds/all"].append(row["seconds"])
    for number, tags in over.items():
        for tag, values in tags.items():
            if (group := tag.partition("/")[0]) in MEANS + SUMS:
                share = len(values) if group in MEANS else 1
                told[number][FEDERATION][tag] = sum(values) / share
    return {number: dict(told[number]) for number in sorted(told)}

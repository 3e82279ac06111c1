"""What a run did: events in, results, tables and plots out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedalt.errors import InputError

Event = Mapping[str, Any]
METRICS = ("rouge1", "exact_match", "loss")


def read_events(path: Path) -> list[Event]:
    """The events of a ``metrics.jsonl``; a last line cut short by a kill is passed over."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def summarise(events: Iterable[Event]) -> dict[str, Any]:
    """``results.json``: by client the last scores, the best by ROUGE-1, and the whole curve.

    Returns:
        ``{"round": last evaluated, "clients": {id: {"last", "best", "curve"}}, "mean": {...}}``;
        scores are percent, losses nats a token.
    """
    clients: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "evaluate":
            row = {"round": event["round"], **{name: event[name] for name in METRICS}}
            clients.setdefault(event["client"], {"curve": []})["curve"].append(row)
    for client in clients.values():
        client["last"] = client["curve"][-1]
        client["best"] = max(client["curve"], key=lambda row: row["rouge1"])
    rounds = [client["last"]["round"] for client in clients.values()]
    mean = {
        when: {name: _mean(client[when][name] for client in clients.values()) for name in METRICS}
        for when in ("last", "best")
        if clients
    }
    return {"round": max(rounds, default=0), "clients": clients, "mean": mean}


def client_table(results: Mapping[str, Any]) -> str:
    """One line a client: the base, the last and the best scores, and the mean below."""
    header = ("client", "ROUGE-1 base", "last", "best", "round", "exact match", "loss")
    rows = []
    for name, client in results["clients"].items():
        first, last, best = client["curve"][0], client["last"], client["best"]
        rows.append(
            [
                name,
                f"{first['rouge1']:.1f}",
                f"{last['rouge1']:.1f}",
                f"{best['rouge1']:.1f}",
                str(best["round"]),
                f"{last['exact_match']:.1f}",
                f"{last['loss']:.3f}",
            ]
        )
    base = _mean(client["curve"][0]["rouge1"] for client in results["clients"].values())
    last, best = results["mean"]["last"], results["mean"]["best"]
    rows.append(
        [
            "mean",
            f"{base:.1f}",
            f"{last['rouge1']:.1f}",
            f"{best['rouge1']:.1f}",
            "",
            f"{last['exact_match']:.1f}",
            f"{last['loss']:.3f}",
        ]
    )
    return table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal: names left, numbers right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def plot_curves(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, path: Path) -> None:
    """ROUGE-1 by round, a line each, as PNG; ``curves`` are (round, percent) points by name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="round", ylabel="ROUGE-1, %", title=title, ylim=(0, 101))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_report(run_dir: Path, title: str) -> tuple[str, Path]:
    """Table and plot of a finished or running run, from its ``metrics.jsonl``.

    Returns:
        The table of clients as text, and the plot's path. Both lie in ``report/``.

    Raises:
        InputError: no client has been scored yet.
    """
    results = summarise(read_events(run_dir / "metrics.jsonl"))
    if not results["clients"]:
        raise InputError(f"{run_dir}: nothing is scored yet; wait for round 0 to finish")
    text = client_table(results)
    plot = run_dir / "report" / "curves.png"
    curves = {
        name: [(row["round"], row["rouge1"]) for row in client["curve"]]
        for name, client in results["clients"].items()
    }
    plot_curves(curves, title, plot)
    (plot.parent / "clients.md").write_text(text + "\n", encoding="utf-8")
    return text, plot


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)

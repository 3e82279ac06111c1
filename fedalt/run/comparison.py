"""Several methods on the same data, seeds and budget: one run each, tables and a page for all."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedalt.config import Config, load_config
from fedalt.data import load_clients
from fedalt.errors import InputError, RunFailed
from fedalt.report import (
    FEW,
    LOCAL,
    Line,
    Results,
    Sheet,
    compare_sheet,
    csv_text,
    deviation,
    digits_of,
    document,
    figures,
    label,
    line_chart,
    mean_of,
    measures,
    number,
    read_results,
    read_times,
    section,
    sheet_html,
    sheet_text,
    wins,
)
from fedalt.run.stage import check
from fedalt.store import CONFIG, RESULTS, claim_run_dir, write_atomic

Runs = Mapping[str, Sequence[Results]]
"""The results of every method, in the order of the seeds."""


@dataclass(frozen=True)
class Job:
    """One run of the comparison, in a process and a directory of its own."""

    config: Config

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def label(self) -> str:
        return f"{self.config.method} seed {self.config.seed}"


def compare(
    config: Config, methods: Sequence[str], seeds: Sequence[int], jobs: int, resume: bool
) -> tuple[str, Path]:
    """Run every method with every seed, ``jobs`` processes at a time, and tabulate them.

    Args:
        config: of every run, but for method and seed; ``out`` takes a folder a run.
        methods: names, in the table's order.
        seeds: every method sees the same ones, so the rows are paired.
        jobs: processes at a time; each gets its share of the CPU's threads.
        resume: go on with runs that were cut short; finished ones are only read.

    Returns:
        The tables (mean ± standard deviation over the seeds) and the path of ``compare.html``;
        ``compare.json``, ``.md`` and ``.csv`` lie beside it.

    Raises:
        InputError: as ``fedalt run`` says; of data and settings before any run starts.
        RunFailed: a run ended with an error; the others are stopped and can be resumed.
    """
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    for items, what in ((methods, "--methods"), (seeds, "--seeds")):
        if len(set(items)) < len(items):
            raise InputError(f"{what}: names one twice; name it once")
    for seed in seeds:
        clients = load_clients(config.data, config.partition, seed)
        for name in methods:
            check(replace(config, method=name, seed=seed), [client.id for client in clients])
        for client in clients:
            client.read()
    root = Path(config.out or f"runs/{config.data.name}-compare")
    threads = config.threads or max(1, (os.cpu_count() or 1) // jobs)
    todo = [
        Job(
            replace(
                config,
                method=name,
                seed=seed,
                threads=threads,
                out=str(root / name / f"seed-{seed}"),
            )
        )
        for seed in seeds
        for name in methods
    ]
    if resume and not config.threads:  # another --jobs must not change a run that has begun
        todo = [_with_its_threads(job) for job in todo]
    for job in todo:
        claim_run_dir(job.config, resume)
    root.mkdir(parents=True, exist_ok=True)
    _run_all([job for job in todo if not (job.out / RESULTS).is_file()], jobs, root)
    runs = {
        name: [_read_run(job.out) for job in todo if job.config.method == name] for name in methods
    }
    text = compare_table(runs, seeds)
    summary = {"methods": runs, "seeds": list(seeds), "config": config.to_dict()}
    title = f"{config.data.name}: {len(methods)} methods, {len(seeds)} seeds"
    contents = {
        "compare.json": json.dumps(summary, indent=1) + "\n",
        "compare.md": text + "\n",
        "compare.csv": compare_csv(runs, seeds),
        "compare.html": compare_page(title, runs, seeds, config.to_yaml()),
    }
    for name, content in contents.items():
        write_atomic(root / name, content)
    return text, root / "compare.html"


def _with_its_threads(job: Job) -> Job:
    file = job.out / CONFIG
    threads = load_config(file).threads if file.is_file() else job.config.threads
    return Job(replace(job.config, threads=threads))


def _read_run(out: Path) -> Results:
    """The results of a finished run, and its ``seconds`` where they were taken down."""
    times = read_times(out / "times.jsonl")
    return {**read_results(out), "seconds": sum(row["seconds"] for row in times) if times else None}


def compare_table(runs: Mapping[str, Sequence[Results]], seeds: Sequence[int]) -> str:
    """The methods' table and, where ``local`` is among them, the differences from it by seed."""
    text = sheet_text(compare_sheet(runs))
    by_seed = seed_sheet(runs, seeds)
    return f"{text}\n\n{sheet_text(by_seed)}" if by_seed else text


def seed_sheet(runs: Mapping[str, Sequence[Results]], seeds: Sequence[int]) -> Sheet | None:
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
    return Sheet([f"{label(main)} by seed", *map(str, seeds), "mean"], rows)


def compare_csv(runs: Mapping[str, Sequence[Results]], seeds: Sequence[int]) -> str:
    """A line a run with unrounded numbers; ``wins`` of ``pairs`` clients are above local."""
    columns = measures(runs)
    rows = []
    for name, results in runs.items():
        for index, (seed, run) in enumerate(zip(seeds, results, strict=True)):
            row = {"method": name, "seed": seed, **{m.name: m.value(run) for m in columns}}
            won = wins([run], runs.get(LOCAL, ())[index : index + 1]) if name != LOCAL else ()
            rows.append(row | dict(zip(("wins", "pairs"), won, strict=False)))
    return csv_text(["method", "seed", *(m.name for m in columns), "wins", "pairs"], rows)


def compare_page(title: str, runs: Runs, seeds: Sequence[int], config: str) -> str:
    """The tables, and the methods' curves by round and by what they sent and received."""
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
        line_chart(f"{label(metric)} by round", "round", _lines(runs, "round", metric))
        for metric in dict.fromkeys((main, "loss"))
    ]
    price = line_chart(
        f"{label(main)} by MiB sent and received so far", "MiB", _lines(runs, "bytes", main)
    )
    return document(
        title,
        {
            "methods": str(len(runs)),
            "seeds": ", ".join(map(str, seeds)),
            "clients": str(len(names)),
        },
        [
            section("Methods", sheet_html(compare_sheet(runs))),
            section("By seed", sheet_html(by_seed)) if by_seed else "",
            section("Curves, mean of seeds and clients", figures(*by_round, price)),
            section(
                f"{label(main)} by client, mean of seeds",
                sheet_html(Sheet(["client", *runs], by_client)),
            ),
        ],
        config,
    )


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
        style = f"c{i % FEW}" + (" dashed" if i >= FEW else "")
        lines.append(Line(name, points, style))
    moved = across == "round" or any(x > 0 for line in lines for x, _ in line.points)
    return lines if moved else []


def _run_all(todo: Sequence[Job], jobs: int, root: Path) -> None:
    """Keep ``jobs`` processes busy; the first that fails ends all, and says why."""
    waiting, running = list(todo), dict[subprocess.Popen[bytes], tuple[Job, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.pop(0)
                running[_start(job, root)] = (job, time.monotonic())
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                job, started = running.pop(process)
                log = root / f"{job.config.method}-{job.config.seed}.log"
                if process.returncode:
                    last = "".join(log.read_text(encoding="utf-8").strip().splitlines()[-1:])
                    if process.returncode == 2:
                        raise InputError(f"{job.label}: {last.removeprefix('fedalt: ')}")
                    raise RunFailed(f"{job.label} failed: {last} (whole log: {log})")
                took = time.monotonic() - started
                print(f"{job.label}: done in {took:.0f} s", file=sys.stderr, flush=True)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _start(job: Job, root: Path) -> subprocess.Popen[bytes]:
    """``fedalt run`` in a process; ``--resume`` starts afresh where there is nothing yet."""
    config = root / f"{job.config.method}-{job.config.seed}.yaml"
    write_atomic(config, job.config.to_yaml())
    command = [sys.executable, "-m", "fedalt", "run", str(config), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.config.threads)}
    with open(config.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

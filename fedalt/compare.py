"""Several methods on the same data, seeds and budget: one run each, one table for all."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedalt import report
from fedalt.checkpoint import write_atomic
from fedalt.config import Config
from fedalt.data import load_clients
from fedalt.errors import InputError, RunFailed
from fedalt.methods import get_method
from fedalt.rundir import METRICS, claim_run_dir

COLUMNS = (
    ("ROUGE-1 last", lambda results: results["mean"]["last"]["rouge1"]),
    ("ROUGE-1 best", lambda results: results["mean"]["best"]["rouge1"]),
    ("exact match", lambda results: results["mean"]["last"]["exact_match"]),
    ("worst client", lambda results: min(c["last"]["rouge1"] for c in results["clients"].values())),
    ("loss", lambda results: results["mean"]["last"]["loss"]),
)


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
        The table (mean ± standard deviation over the seeds) and the plot's path.

    Raises:
        InputError: as ``fedalt run`` says, before any run starts.
        RunFailed: a run ended with an error; the others are stopped and can be resumed.
    """
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    for name in methods:
        get_method(name)
    for items, what in ((methods, "--methods"), (seeds, "--seeds")):
        if len(set(items)) < len(items):
            raise InputError(f"{what}: names one twice; name it once")
    for seed in seeds:
        load_clients(config.data, seed)
    root = Path(config.out or f"runs/{Path(config.data.path).name}-compare")
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
    for job in todo:
        claim_run_dir(job.config, resume)
    root.mkdir(parents=True, exist_ok=True)
    _run_all(todo, jobs, root)
    runs = {
        name: [
            report.summarise(report.read_events(job.out / METRICS))
            for job in todo
            if job.config.method == name
        ]
        for name in methods
    }
    text = compare_table(runs)
    summary = {"methods": runs, "seeds": list(seeds), "config": config.to_dict()}
    write_atomic(root / "compare.json", json.dumps(summary, indent=1) + "\n")
    write_atomic(root / "compare.md", text + "\n")
    plot = root / "compare.png"
    title = f"{config.data.path}: mean of {len(seeds)} seeds and all clients"
    report.plot_curves({name: _mean_curve(results) for name, results in runs.items()}, title, plot)
    return text, plot


def compare_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line a method: mean ± standard deviation over the seeds of means over the clients."""
    rows = []
    for name, results in runs.items():
        digits = [3 if title == "loss" else 1 for title, _ in COLUMNS]
        values = [[value_of(result) for result in results] for _, value_of in COLUMNS]
        rows.append([name, *(_spread(v, d) for v, d in zip(values, digits, strict=True))])
    return report.table(("method", *(title for title, _ in COLUMNS)), rows)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _mean_curve(results: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    curves = [c["curve"] for result in results for c in result["clients"].values()]
    return [
        (rows[0]["round"], statistics.mean(row["rouge1"] for row in rows))
        for rows in zip(*curves, strict=True)
    ]


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
                    last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
                    raise RunFailed(f"{job.label} failed: {''.join(last)} (whole log: {log})")
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

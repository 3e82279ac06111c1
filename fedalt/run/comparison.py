"""Several methods on the same data, seeds and budget: one run each, tables and a page for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedalt.config import Config, load_config
from fedalt.data import load_clients
from fedalt.errors import InputError, RunFailed
from fedalt.report import (
    Results,
    compare_csv,
    compare_page,
    compare_table,
    console_text,
    count,
    method_verdict,
    read_results,
    read_times,
    wrapped,
)
from fedalt.run.stage import check
from fedalt.store import CONFIG, RESULTS, TIMES, about, claim_run_dir, write_atomic


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
        For a terminal, the tables (mean ± standard deviation over the seeds) and the verdict; and
        the path of ``compare.html``;
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
    print(
        f"{', '.join(methods)} with {count(len(seeds), 'seed')}, "
        f"{count(len(clients), 'client')}, {count(config.rounds, 'round')} -> {root}",
        file=sys.stderr,
        flush=True,
    )
    _run_all([job for job in todo if not (job.out / RESULTS).is_file()], jobs, root)
    runs = {
        name: [_read_run(job.out) for job in todo if job.config.method == name] for name in methods
    }
    times = [row for job in todo for row in read_times(job.out / TIMES)]
    summary = {"methods": runs, "seeds": list(seeds), "config": config.to_dict()}
    title = f"{config.data.name}: {len(methods)} methods, {len(seeds)} seeds"
    contents = {
        "compare.json": json.dumps(summary, indent=1) + "\n",
        "compare.md": compare_table(runs, seeds) + "\n",
        "compare.csv": compare_csv(runs, seeds),
        "compare.html": compare_page(title, runs, seeds, config.to_yaml(), times),
    }
    for name, content in contents.items():
        write_atomic(root / name, content)
    text = f"{compare_table(runs, seeds, console_text)}\n\n{wrapped(method_verdict(runs, seeds))}"
    return text, root / "compare.html"


def _with_its_threads(job: Job) -> Job:
    file = job.out / CONFIG
    threads = load_config(file).threads if file.is_file() else job.config.threads
    return Job(replace(job.config, threads=threads))


def _read_run(out: Path) -> Results:
    """The results of a finished run, and its ``seconds`` where they were taken down."""
    times = read_times(out / TIMES)
    return {**read_results(out), "seconds": sum(row["seconds"] for row in times) if times else None}


def _run_all(todo: Sequence[Job], jobs: int, root: Path) -> None:
    """Keep ``jobs`` processes busy; the first that fails ends all, and says why."""
    waiting, running = list(todo), dict[subprocess.Popen[bytes], tuple[Job, float]]()
    began, done = time.monotonic(), 0
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
                now, done = time.monotonic(), done + 1
                line = f"{job.label}: done in {now - started:.0f} s"
                if left := len(todo) - done:
                    rest = about((now - began) / done * left)
                    line += f", {count(left, 'run')} and {rest} left"
                print(line, file=sys.stderr, flush=True)
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

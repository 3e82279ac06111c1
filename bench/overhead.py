"""What the federated loop costs beyond its clients' own work.

A round of the loop (states read and written, updates checked and combined, events, a checkpoint on
disk) beside the same clients' training and evaluation alone, on the same model with their states
at hand. The two take turns, round after round; the medians of the ratios count. The machine may be
shared, so CPU time is given beside wall time. Answers generated in the loop come from after the
exchange, those alone from before it, and may differ a little in length.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fedalt.config.schema import Config
from fedalt.config.settings import load_config
from fedalt.errors import InputError, RunFailed
from fedalt.evaluation import Examined
from fedalt.model.states import load_adapter_state
from fedalt.report.tables import table
from fedalt.run import federation as federation
from fedalt.run.cohort import derive_seed
from fedalt.run.stage import Stage
from fedalt.store.checkpoint import list_checkpoints, load_checkpoint
from fedalt.store.journal import Progress
from fedalt.training.client import train_client

GOAL = 1.1


class Seconds(NamedTuple):
    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Seconds:
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Seconds) -> Seconds:
        return Seconds(self.wall - start.wall, self.cpu - start.cpu)


class Clock(Progress):
    """Takes the time of every round, and between two rounds that of the clients' bare work."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.config.rounds, 1, 0)
        self._stage, self._start = stage, Seconds.now()
        self.pairs: list[tuple[Seconds, Seconds]] = []

    def end_round(self, number: int) -> None:
        took = Seconds.now().since(self._start)
        if 0 < number < self._stage.config.rounds:  # the last is evaluated three times over
            self.pairs.append((took, bare(self._stage, number)))
            print(f"round {number}: {took.wall:.2f} s", file=sys.stderr, flush=True)
        self._start = Seconds.now()


def bare(stage: Stage, number: int) -> Seconds:
    """The seconds that all clients take to train a round and be evaluated, and nothing else."""
    saved = load_checkpoint(list_checkpoints(Path(stage.config.out))[-1])
    total = Seconds(0.0, 0.0)
    for member in stage.known:
        examples = stage.examples(member)
        load_adapter_state(stage.model, saved.next(member.id).read())
        start = Seconds.now()
        train_client(
            stage.model,
            examples.train,
            stage.config.train,
            stage.task.loss,
            trains=stage.trains(member.id),
            seed=derive_seed(stage.config.seed, number, member.id),
        )
        if number % stage.config.evaluate.every == 0:
            stage.task.evaluate(stage.model, [Examined(examples.test, examples.test_records)])
        took = Seconds.now().since(start)
        total = Seconds(total.wall + took.wall, total.cpu + took.cpu)
    return total


def measure(config: Config) -> list[tuple[Seconds, Seconds]]:
    """Of every round but the last: the loop's seconds and the clients' own."""
    clocks: list[Clock] = []

    def progress(stage: Stage, done: int) -> Progress:
        clocks.append(Clock(stage))
        return clocks[0]

    original, federation._progress = federation._progress, progress
    try:
        with tempfile.TemporaryDirectory() as folder:
            federation.Federation(replace(config, out=str(Path(folder) / "run"))).run()
    finally:
        federation._progress = original
    return clocks[0].pairs


def main(data: str, settings: Sequence[str], repeats: int) -> int:
    """Print the table; status 1 if the median of the CPU times' ratios is above the goal."""
    try:
        config = load_config(None, (f"rounds={repeats + 1}", "threads=1", *settings))
        if data:
            config = replace(config, data=replace(config.data, path=data))
        pairs = measure(config)
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    rows = []
    for number, (loop, alone) in enumerate(pairs, 1):
        seconds = (loop.wall, alone.wall, loop.cpu, alone.cpu)
        ratios = (loop.wall / alone.wall, loop.cpu / alone.cpu)
        rows.append([str(number), *(f"{s:.2f}" for s in seconds), *(f"{r:.3f}" for r in ratios)])
    header = ("round", "loop s", "clients s", "loop CPU s", "clients CPU s", "ratio", "CPU ratio")
    print(table(header, rows))
    wall, cpu = (statistics.median(loop[i] / alone[i] for loop, alone in pairs) for i in range(2))
    print(f"median ratio {wall:.3f} of wall time, {cpu:.3f} of CPU time; goal {GOAL}")
    return int(cpu > GOAL)

"""What a training step takes in memory and time, beside PEFT on the same base and batch.

Every figure is of a process of its own, so that peaks do not mix. The two of a pair, ours and
PEFT's, are alive together and step in turn, so that what disturbs the machine disturbs both; ratios
of time are medians over the turns. Both use the loop's own loss, and checkpointing where it is on.
The peak is of the steps, over the process when its libraries were loaded and no model was: what
loading took at most is not in it.

    python -m bench memory
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .device import cuda_device, describe, missing
from .measure import markdown, surroundings
from .memory_worker import FEDALT, PEFT
from .report import write_table
from .worker import Failed, Worker

STEPS, QUICK_STEPS = 3, 2
BASES = ("float32", "bfloat16", "int8", "nf4", "fp8")
TITLE = "A training step's peak memory and time, beside PEFT"
# As a rule freed blocks go back to the system, so that a peak is of live memory.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}


class Pair(NamedTuple):
    """A model on one storage of its base, with or without checkpointing."""

    model: str
    base: str
    checkpointing: bool


def pairs(cuda: bool) -> Iterator[Pair]:
    """Those that say most come first."""
    models = ["Llama-2-7B", "Llama 0.1B"] if cuda else ["built-in", "Llama 0.1B"]
    for model in models:
        for checkpointing in (False, True):
            for base in BASES:
                if (model, base) != ("Llama-2-7B", "float32"):  # 27 GB: nobody trains so
                    yield Pair(model, base, checkpointing)


def absence(pair: Pair, make: str) -> str:
    """Why a candidate cannot be had here, or nothing."""
    if make == PEFT and pair.base == "fp8":
        return "PEFT has no fp8 base"
    wanted = ["transformers"] + (["peft"] if make == PEFT else [])
    wanted += ["bitsandbytes"] if pair.base in ("int8", "nf4") else []
    return next((reason for reason in map(missing, wanted) if reason), "")


def measure(pair: Pair, device: str, steps: int, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of a pair, PEFT's first; what is left out is told in ``notes``."""
    workers: dict[str, Worker] = {}
    said: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    times_ms: dict[str, list[float]] = {PEFT: [], FEDALT: []}
    environment = {**os.environ, **ALLOCATOR, "HF_HUB_OFFLINE": "1"}
    try:
        for make in (PEFT, FEDALT):
            absent[make] = absence(pair, make)
            if not absent[make]:
                job = {**pair._asdict(), "make": make, "device": device}
                workers[make] = Worker("bench.memory_worker", job, environment)
        words = ["", *["step"] * steps, "end"]
        for word in words:
            for make, worker in list(workers.items()):
                try:
                    said[make] = worker.answer(word)
                except Failed as error:
                    absent[make] = str(error)
                    workers.pop(make).end()
                    continue
                if word == "step":
                    times_ms[make].append(said[make]["ms"])
        return [_row(pair, make, times_ms, said, absent) for make in workers]
    finally:
        for make, reason in absent.items():
            if reason:
                kept = "checkpointing" if pair.checkpointing else "no checkpointing"
                notes.append(f"{pair.model}, {pair.base}, {kept}, {make}: left out: {reason}")
        for worker in workers.values():
            worker.end()


def _row(
    pair: Pair,
    make: str,
    times_ms: dict[str, list[float]],
    said: dict[str, dict[str, Any]],
    absent: dict[str, str],
) -> dict[str, Any]:
    times, peak = times_ms[make], said[make]["peak"]
    memory: object = absent[PEFT]
    pace: object = absent[PEFT]
    if not absent[PEFT]:
        memory = peak / said[PEFT]["peak"]
        turns = zip(times, times_ms[PEFT], strict=True)
        pace = statistics.median(mine / theirs for mine, theirs in turns)
    return {
        "model": pair.model,
        "base": pair.base,
        "checkpointing": "on" if pair.checkpointing else "off",
        "adapters": make,
        "peak MiB": f"{peak / 2**20:.1f}",
        "peak / PEFT": memory,
        "step ms": f"{statistics.median(times):.1f}",
        "step / PEFT": pace,
    }


def run(out: Path | None, budget_s: float, quick: bool = False) -> list[dict[str, Any]]:
    """Measures every pair while there is time; prints the tables, writes them as they grow.

    Args:
        out: takes a folder named after the device; None: nothing is written.
        quick: two steps of the built-in base alone, to see that it works.
    """
    started = time.monotonic()
    cuda = torch.cuda.is_available()
    about = {"command": "python -m bench memory", **surroundings()}
    device, folder = "cpu", None if out is None else out / "cpu"
    if cuda:
        from fedalt_kernels.triton.tiles import device_name

        about |= describe(cuda_device())
        device, folder = "cuda", None if out is None else out / device_name(cuda_device())
    _saved(folder, about)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for pair in pairs(cuda):
        if quick and pair.model != "built-in":
            continue
        if time.monotonic() - started > budget_s:
            notes.append(f"{', '.join(map(str, pair))}: left out: the time is spent")
            continue
        rows += measure(pair, device, QUICK_STEPS if quick else STEPS, notes)
        print(f"{pair}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        if folder is not None:
            write_table(folder, "memory", TITLE, about, rows, notes)
    if rows:
        print(markdown(rows[0], [row.values() for row in rows]))
    print("\n".join(notes))
    return rows


def _saved(folder: Path | None, about: dict[str, str]) -> None:
    """What one adapted layer keeps for its backward."""
    from .memory_worker import saved_rows

    rows = saved_rows()
    print(markdown(rows[0], [row.values() for row in rows]))
    if folder is not None:
        write_table(folder, "saved", "What one adapted layer keeps for its backward", about, rows)

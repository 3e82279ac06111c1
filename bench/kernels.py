"""The layer under every schedule beside its peers, on a GPU: checked first, then timed.

Cases go in the order of `cases.in_order` as far as the time allows, in batches: worker processes
run each candidate of the coming batch once, which fills Triton's cache on disk and checks the
results, and only when they are idle are those that passed timed, in this process.  A candidate
that fails, or hangs, takes its worker with it and nothing else.

    python -m bench kernels --budget 300
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch

from . import candidates, roofline
from .candidates import COMPILED, PLAIN, Verdict
from .cases import MOST_DECODE_ROWS, Case, goals, in_order
from .device import (
    Call,
    Rounds,
    brief,
    captured,
    copies_for,
    copy_bandwidth,
    cuda_device,
    describe,
    host_us,
    matrix_rate,
    peak_bytes,
)
from .measure import saved_bytes, surroundings
from .report import write_table

BATCH = 8  # cases
ROUNDS = 5
ANSWER_S = 100.0  # that a batch's workers are given
LEAST_S = 15.0  # with less left, no batch is begun
HUNG = "it hung in an earlier case"
TITLE = "The layer on a GPU, beside its peers"

Named = tuple[Case, str]
Verdicts = dict[Named, Verdict]


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def rehearse(cases: list[Case], name: str) -> list[Verdict]:
    """A worker's part: one candidate's run and check in every one of the cases."""
    verdicts = []
    for case in cases:
        try:
            verdicts.append(candidates.check(case, name, cuda_device()))
        except Exception as error:  # whatever it is, it is this candidate's row
            verdicts.append(Verdict(float("nan"), brief(error)))
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return verdicts


class Workers:
    """Processes that rehearse; started anew when one of them hangs, without what hung."""

    def __init__(self, count: int) -> None:
        # Each compiles one thing at a time: a pool within every worker would only contend.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        self.count = count
        self.pool: Pool | None = None
        self.hung: set[str] = set()

    def judge(self, batch: list[Case], patience_s: float) -> Verdicts:
        """The verdict on every candidate of the cases; who keeps silent longer is refused."""
        if self.pool is None:
            self.pool = multiprocessing.get_context("spawn").Pool(self.count)
        groups: dict[tuple[object, ...], tuple[str, list[Case]]] = {}
        for case in batch:
            for name in candidates.names_for(case):
                # What has its kernels in common is one worker's, so that each compiles once.
                small = case.m <= MOST_DECODE_ROWS
                key = (case.layer, case.rank, case.dropout, small, name)
                groups.setdefault(key, (name, []))[1].append(case)
        verdicts: Verdicts = {}
        answers = []
        # What takes longest to compile goes first, so that it does not end alone.
        for name, cases in sorted(groups.values(), key=lambda group: group[0] != COMPILED):
            reason = HUNG if name in self.hung else candidates.absence(name)
            if reason:
                verdicts |= {(case, name): Verdict(float("nan"), reason) for case in cases}
            else:
                answers.append((name, cases, self.pool.apply_async(rehearse, (cases, name))))
        deadline = time.monotonic() + patience_s
        silent: set[str] = set()
        for name, cases, answer in answers:
            try:
                found = answer.get(max(0.0, deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                silent.add(name)
                none = Verdict(float("nan"), f"no answer within {patience_s:.0f} s")
                found = [none] * len(cases)
            verdicts |= {(case, name): each for case, each in zip(cases, found, strict=True)}
        if silent:
            self.close()
        if patience_s >= ANSWER_S:
            self.hung |= silent
        return verdicts

    def close(self) -> None:
        """Ends the processes."""
        if self.pool is not None:
            self.pool.terminate()
            self.pool.join()
            self.pool = None


def run(budget_s: float, results: Path, workers: int = 8) -> list[dict[str, Any]]:
    """Measures for about `budget_s` seconds, and writes ``kernels`` under the device's folder."""
    deadline = time.monotonic() + budget_s
    device = cuda_device()
    ceilings = copy_bandwidth(device), matrix_rate(device)
    about = {
        "command": f"python -m bench kernels --budget {budget_s:.0f}",
        **surroundings(),
        **describe(device),
        "copy bandwidth, TB/s": f"{ceilings[0] / 1e12:.2f}",
        "bfloat16 product, TFLOP/s": f"{ceilings[1] / 1e12:.0f}",
        "µs": f"device time, events; up to {MOST_DECODE_ROWS} rows a CUDA graph over many weights",
        "% of ceiling": f"plain product's work over time; bandwidth to {MOST_DECODE_ROWS} rows",
    }
    say(f"copy {about['copy bandwidth, TB/s']} TB/s, product {ceilings[1] / 1e12:.0f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    queue = in_order()
    crew = Workers(workers)
    try:
        while queue and (left := deadline - time.monotonic()) > LEAST_S:
            batch, queue = queue[:BATCH], queue[BATCH:]
            say(f"compiling and checking {len(batch)} cases; {len(queue)} after them")
            verdicts = crew.judge(batch, min(ANSWER_S, left))
            for i, case in enumerate(batch):
                if time.monotonic() >= deadline:
                    queue = batch[i:] + queue
                    break
                passed = _passed(case, verdicts, notes)
                rows += measure(case, passed, device, ceilings, notes)
            _write(results, about, rows, notes, queue)
    finally:
        crew.close()
    print(_write(results, about, rows, notes, queue))
    return rows


def _passed(case: Case, verdicts: Verdicts, notes: list[str]) -> dict[str, float]:
    """The candidates to time, with their errors; the others are named in the notes."""
    passed = {}
    for name in candidates.names_for(case):
        error, refusal = verdicts[case, name]
        if not refusal:
            passed[name] = error
        elif refusal in (HUNG, candidates.absence(name)):
            text = f"{name}: left out: {refusal}"
            if text not in notes:
                _note(notes, text)
        else:
            _note(notes, f"{case}: {name} not timed: {refusal}")
    return passed


def _note(notes: list[str], text: str) -> None:
    notes.append(text)
    say(text)


def measure(
    case: Case,
    passed: Mapping[str, float],
    device: torch.device,
    ceilings: tuple[float, float],
    notes: list[str],
) -> list[dict[str, Any]]:
    """The rows of one case; `passed` gives the candidates' errors."""
    if PLAIN not in passed:
        return []
    torch.compiler.reset()
    layer, (x, dy) = candidates.layer_of(case, device), candidates.inputs_of(case, device)
    small = case.m <= MOST_DECODE_ROWS
    turns = copies_for(layer.weight.nbytes, device) if small else 1
    layers = [layer, *(copy.deepcopy(layer) for _ in range(turns - 1))]
    timed: dict[str, Call] = {}
    rest: dict[str, dict[str, Any]] = {}
    for name in passed:
        try:
            peers = [candidates.build(name, each) for each in layers]
            calls = [candidates.call_of(case, name, peer, x, dy) for peer in peers]
            rest[name] = {
                "host µs": host_us(calls[0]),
                "peak MiB": peak_bytes(calls[0]) / 2**20,
                "saved KiB": saved_bytes(peers[0], x) // 1024 if x.requires_grad else 0,
                "relative error": f"{passed[name]:.1e}",
            }
            timed[name] = captured(calls) if small else calls[0]
        except RuntimeError as error:
            _note(notes, f"{case}: {name} not timed: {brief(error)}")
    if PLAIN not in timed:
        return []
    rounds = Rounds(timed)
    rounds.run(ROUNDS)
    rows = []
    for name in timed:
        p20, median, p80 = (each / turns for each in rounds.percentiles_us(name))
        row: dict[str, Any] = {
            "layer": f"{case.layer.model} {case.layer.name}",
            "M": case.m,
            "N": case.layer.n,
            "K": case.layer.k,
            "r": case.rank,
            "dropout": str(case.dropout),
            "direction": case.direction,
            "candidate": name,
            "median µs": median,
            "p20 µs": p20,
            "p80 µs": p80,
            "time / plain": rounds.ratio(name, PLAIN),
            "% of ceiling": 100 * share_of_ceiling(case, median, ceilings),
        }
        rows.append(row | rest[name])
        say(f"{case}: {name} {median:.1f} µs, {row['time / plain']:.3f}")
    del timed, rounds, layers, peers, calls
    torch.cuda.empty_cache()  # the next batch's workers want it
    return rows


def share_of_ceiling(case: Case, time_us: float, ceilings: tuple[float, float]) -> float:
    """The plain linear's bytes, or operations, over what the device could do in that time."""
    plain = roofline.plain(case)
    if case.m <= MOST_DECODE_ROWS:
        return sum(launch.moved for launch in plain) / (1e-6 * time_us * ceilings[0])
    return sum(launch.product for launch in plain) / (1e-6 * time_us * ceilings[1])


def _write(
    results: Path,
    about: Mapping[str, str],
    rows: list[dict[str, Any]],
    notes: list[str],
    queue: list[Case],
) -> str:
    wanted = set(goals())
    missed = [case for case in queue if case in wanted]
    left_out = [f"left out for want of time: {case}" for case in missed]
    if len(queue) > len(missed):
        left_out.append(f"and {len(queue) - len(missed)} cases that no goal is set for")
    return write_table(results, "kernels", TITLE, about, rows, [*notes, *left_out])

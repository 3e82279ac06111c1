"""The host's time of a layer's call: what Python and PyTorch take to launch it, device left behind.

On a GPU that is what is measured, at x [4096, 4096].  Without one, Triton gets a driver that only
counts launches (`standin`), and x is [80, 64], so that what PyTorch computes on the CPU is little;
the call goes through the same functions to the same launches.  Such a figure is the thread's own
time, and for comparing trees, not machines.  Not in it: Triton's launcher in C, about 6 µs a
launch; the device's part of PyTorch's launches and allocations; autograd's handing over to a thread
of the device; questions to the CUDA driver.  In it, but not on a GPU: those small computations, of
which the peers have more than we.

Ours and its peers take turns in a process, and so do the processes of two trees; ratios are
medians over the rounds of a round's ratio.

    python -m bench host --against HEAD~1
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .device import Unavailable, cuda_device, describe, missing
from .host_worker import KINDS, ONE, OURS, PLAIN, TWO, Case, cases
from .measure import markdown, surroundings
from .report import write_table
from .worker import Failed, Worker

ROOT = Path(__file__).parents[1]
PACKAGE = "fedalt_kernels"
TITLE = "The host's time of a layer's call"
ANSWER_S = 300.0  # its first answer waits for the compiler
NOW, BEFORE = "now", "before"
CALLED = {
    "layer": "a layer",
    "group": "q, k and v",
    "decode": "decode, one row",
    "cpu": "impl torch, x [1, 4, 16] float32",
}

Times = list[list[float]]  # rounds of calls, µs


def run(
    kinds: Sequence[str] = KINDS,
    rounds: int = 20,
    against: str = "",
    profile: bool = False,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Measures, prints, and returns the table's rows.

    Args:
        kinds: of cases, some of `KINDS`.
        against: a commit, or a folder that holds the package, to be measured beside this tree.
        profile: print where a call's time goes, function by function, as well.
        out: takes a folder named after the device; None: nothing is written.

    Raises:
        Unavailable: there is no such commit, or a tree cannot be measured.
    """
    about = {"command": "python -m bench host", **surroundings(), **_device()}
    if against:
        about[BEFORE] = against
    with ExitStack() as stack:
        trees = {NOW: ROOT}
        if against:
            trees[BEFORE] = stack.enter_context(tree_of(against))
        workers = {name: stack.enter_context(_worker(tree, kinds)) for name, tree in trees.items()}
        counted = {}
        for name, worker in workers.items():
            ready = _ask(name, worker)
            if ready["package"] != str(trees[name] / PACKAGE):
                raise Unavailable(f"{PACKAGE} is {ready['package']}, not {trees[name]}'s")
            counted[name] = ready["counted"]
        print(f"launches are counted; {rounds} rounds", file=sys.stderr, flush=True)
        times: dict[str, list[Any]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                times[name].append(_ask(name, worker, "round")["times"])
        watched = workers.items() if profile else ()
        profiles = {name: _ask(name, each, "profile")["profiles"] for name, each in watched}
    rows, notes = [], []
    for i, case in enumerate(cases(kinds)):
        taken = {tree: _of_case(each, i) for tree, each in times.items()}
        found = {tree: each[i] for tree, each in counted.items()}
        rows.append(_row(case, taken, found))
        notes.append(_launches(case, found))
    if reason := missing("peft"):
        notes.append(f"PEFT's are left out: {reason}")
    if out is None:
        print(markdown(rows[0], [row.values() for row in rows]))
        print("".join(f"- {note}\n" for note in notes))
    else:
        print(write_table(out / about["device"], "host", TITLE, about, rows, notes))
    for tree, trees_of_steps in profiles.items():
        for i, case in enumerate(cases(kinds)):
            print(f"## {_name(case)}, {tree}\n")
            files = _listed(counted[tree][i][OURS]["files"])
            print(f"How often it enters each file of the package: {files}.\n")
            print("\n".join(["```", "     µs    own", *trees_of_steps[i], "```\n"]))
    return rows


def _device() -> dict[str, str]:
    """What a call runs on; "device" names its folder of results."""
    if not torch.cuda.is_available():
        return {"device": "cpu", "GPU": "none: sm_90's launches, counted by a stand-in"}
    from fedalt_kernels.triton.tiles import device_name

    device = cuda_device()
    return {"device": device_name(device), **describe(device)}


@contextmanager
def tree_of(against: str) -> Iterator[Path]:
    """A folder that holds the package as of a commit, or the given one."""
    if (Path(against) / PACKAGE).is_dir():
        yield Path(against).resolve()
        return
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", against, PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        raise Unavailable(f"--against {against}: {lines[0]}") from None
    except OSError as error:
        raise Unavailable(f"--against {against}: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


@contextmanager
def _worker(tree: Path, kinds: Sequence[str]) -> Iterator[Worker]:
    """A process that has the package from a tree, and these benchmarks."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(tree), str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
    worker = Worker("bench.host_worker", {"kinds": list(kinds)}, environment, ANSWER_S)
    try:
        yield worker
    finally:
        worker.end()


def _ask(tree: str, worker: Worker, word: str = "") -> dict[str, Any]:
    try:
        return worker.answer(word)
    except Failed as error:
        raise Unavailable(f"the tree {tree} cannot be measured: {error}") from None


def _of_case(rounds: Sequence[Any], i: int) -> dict[str, Times]:
    """Each candidate's times in the i-th case."""
    return {name: [each[i][name] for each in rounds] for name in rounds[0][i]}


def _row(
    case: Case, times: dict[str, dict[str, Times]], counted: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    now, found = times[NOW], counted[NOW][OURS]
    p20, median, p80 = np.percentile(np.concatenate(now[OURS]), [20, 50, 80])
    row: dict[str, Any] = {
        "call": CALLED[case.kind],
        "dropout": str(case.dropout),
        "direction": "both" if case.both else "forward",
        "ours µs": round(median, 1),
        "p20": round(p20, 1),
        "p80": round(p80, 1),
        **_sizes(found),
    }
    if BEFORE in times:
        before, found = times[BEFORE][OURS], counted[BEFORE][OURS]
        row |= {
            "before µs": round(_median(before), 1),
            "now / before": _ratio(now[OURS], before),
            **{f"before: {key}": value for key, value in _sizes(found).items()},
        }
    for peer in (PLAIN, ONE, TWO):
        row[f"{peer} µs"] = round(_median(now[peer]), 1) if peer in now else "-"
    for peer in (PLAIN, ONE):
        row[f"ours / {peer}"] = _ratio(now[OURS], now[peer]) if peer in now else "-"
    return row


def _sizes(found: dict[str, Any]) -> dict[str, int]:
    """Of what was counted in a call."""
    return {
        "Triton launches": sum(found["kernels"].values()),
        "PyTorch launches": sum(found["operators"].values()),
        "files": len(found["files"]),
    }


def _median(times: Times) -> float:
    return float(np.median(np.concatenate(times)))


def _ratio(mine: Times, theirs: Times) -> float:
    """The median over the rounds of the ratio of the rounds' medians."""
    pairs = zip(mine, theirs, strict=True)
    return float(np.median([np.median(ours) / np.median(other) for ours, other in pairs]))


def _name(case: Case) -> str:
    direction = "forward and backward" if case.both else "forward"
    return f"{CALLED[case.kind]}, dropout {case.dropout}, {direction}"


def _launches(case: Case, counted: dict[str, dict[str, Any]]) -> str:
    """What a call launches: by name for us, by number for the peers, who are alike in all trees."""
    parts = []
    for tree, candidates in counted.items():
        found = candidates[OURS]
        names = [_listed(found[key]) for key in ("kernels", "operators") if found[key]]
        parts.append(f"{tree} {' and '.join(names)}")
    for peer, found in counted[NOW].items():
        if peer != OURS:
            parts.append(f"{peer} {sum(found['operators'].values())}")
    return f"{_name(case)}: {'; '.join(parts)}"


def _listed(counted: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counted.items())

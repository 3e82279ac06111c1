"""An opt-in search over tiles for the GPU at hand; what it finds goes before the shipped table.

Every kernel and kind has a probe, a whole pass that depends on its tile.  The search starts at the
tile in use and tries its neighbours, one size halved or doubled, one stage more or less, then the
neighbours of the best of them, until none is faster or the time is spent.  A tile that does not
compile, does not fit or returns something else is passed over.

    python -m bench tune --budget 600
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedalt_kernels import fused, plans
from fedalt_kernels.adapter import Branches
from fedalt_kernels.dropout import drop_threshold, keep_scale
from fedalt_kernels.triton import tiles
from fedalt_kernels.triton.tiles import Kinds, Tile

from . import candidates
from .cases import MOST_DECODE_ROWS, Case, Q
from .device import (
    Call,
    brief,
    captured,
    copies_for,
    cuda_device,
    describe,
    event_times_us,
)
from .measure import surroundings

LEAST_SIDE, MOST_SIDE, MOST_AREA = 16, 256, 128 * 256
STAGES, WARPS = (1, 6), (4, 8)
WORTH = 0.99  # a tile that saves less than a hundredth is not written
TIMES = 15

Pass = Callable[[], list[Tensor]]


class Probe(NamedTuple):
    """The pass by which a kernel's tile of one kind is judged."""

    kernel: str
    kind: str
    case: Case
    schedule: str


def _probe(
    kernel: str, kind: str, schedule: str, direction: str = "forward", m: int = 8192
) -> Probe:
    rank = 64 if kind == "wide" else 8
    dropout = 0.05 if kind == "dropout" else 0.0
    return Probe(kernel, kind, Case(Q, m, rank, direction, dropout), schedule)


PROBES = (
    _probe("overlapped", "half", "overlapped"),
    _probe("overlapped", "wide", "overlapped"),
    _probe("overlapped", "dropout", "overlapped"),
    _probe("overlapped_backward", "half", "overlapped", "backward"),
    _probe("overlapped_backward", "wide", "overlapped", "backward"),
    _probe("decode", "half", "decode", m=16),
    _probe("decode", "wide", "decode", m=16),
    _probe("contract", "half", "split"),
    _probe("contract", "wide", "split"),
    _probe("contract_backward", "half", "split", "backward"),
    _probe("contract_backward", "wide", "split", "backward"),
    _probe("contract_backward", "dropout", "split", "backward"),
    _probe("project", "half", "split"),
    _probe("project", "wide", "split"),
    _probe("project", "dropout", "split"),
    _probe("spread", "half", "split", "backward"),
    _probe("spread", "wide", "split", "backward"),
    _probe("reduce", "half", "split", "backward"),
    _probe("reduce", "wide", "split", "backward"),
    _probe("reduce", "dropout", "split", "backward"),
    _probe("recompute", "half", "recompute", m=64),
    _probe("recompute", "wide", "recompute", m=64),
)


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles that differ in one field; a field that is 0 stays so."""
    for field in ("m", "n", "k"):
        size = getattr(tile, field)
        for other in (size // 2, size * 2):
            changed = tile._replace(**{field: other})
            if size and LEAST_SIDE <= other <= MOST_SIDE and changed.m * changed.n <= MOST_AREA:
                yield changed
    for stages in (tile.stages - 1, tile.stages + 1):
        if STAGES[0] <= stages <= STAGES[1]:
            yield tile._replace(stages=stages)
    for warps in (tile.warps // 2, tile.warps * 2):
        if WARPS[0] <= warps <= WARPS[1]:
            yield tile._replace(warps=warps)


def search(
    start: Tile, time_us: Callable[[Tile], float], out_of_time: Callable[[], bool]
) -> tuple[Tile, float]:
    """The fastest tile found by going downhill from `start`, and its time."""
    best, fastest = start, time_us(start)
    seen = {start}
    improved = True
    while improved:
        improved = False
        for tile in neighbours(best):
            if tile in seen:
                continue
            if out_of_time():
                return best, fastest
            seen.add(tile)
            taken = time_us(tile)
            if taken < fastest:
                best, fastest, improved = tile, taken, True
    return best, fastest


def passes_of(probe: Probe, device: torch.device) -> list[Pass]:
    """The probe's pass; for a few rows on as many weights as do not fit in the L2 cache."""
    case = probe.case
    x, dy = candidates.inputs_of(case, device)
    x = x.detach()
    turns = 1
    if case.m <= MOST_DECODE_ROWS:
        turns = copies_for(case.layer.n * case.layer.k * 2, device)
    return [_pass(probe, x, dy, device) for _ in range(turns)]


def _pass(probe: Probe, x: Tensor, dy: Tensor, device: torch.device) -> Pass:
    case = probe.case
    layer = candidates.layer_of(case, device)
    weight, mixer = layer.weight.detach(), layer.mixer.detach()
    downs = [a.detach() for a, _ in layer.adapters]
    ups = [b.detach() for _, b in layer.adapters]
    threshold = drop_threshold(case.dropout)
    seed = torch.tensor(candidates.SEED, device=device) if threshold else None
    scaling = layer.scaling * keep_scale(threshold)
    branches = Branches(downs, ups, mixer, None, scaling, threshold, seed, probe.schedule)
    if case.direction == "forward":
        return lambda: list(fused.forward(x, weight, None, branches)[:3])
    _, low, gates, *_ = fused.forward(x, weight, None, branches)
    needs = [True, True, True, False, True, False]
    return lambda: fused.backward(dy, x, weight, low, gates, branches, needs)


def tune_one(probe: Probe, device: torch.device, out_of_time: Callable[[], bool]) -> list[float]:
    """Leaves the fastest tile of a probe in `tiles.tuned`; returns the times before and after."""
    passes = passes_of(probe, device)
    kinds = tiles.tuned(device).setdefault(probe.kernel, {})
    before = kinds.get(probe.kind)
    shipped = tiles.TABLE[tiles.architecture(device)][probe.kernel]
    start = before or shipped.get(probe.kind, shipped["half"])
    truth = [made.clone() for made in passes[0]()]

    times_us: dict[Tile, float] = {}

    def time_us(tile: Tile) -> float:
        times_us[tile] = judged(tile)
        print(f"  {tuple(tile)}: {times_us[tile]:.1f} µs", file=sys.stderr, flush=True)
        return times_us[tile]

    def judged(tile: Tile) -> float:
        kinds[probe.kind] = tile
        plans.forget()
        try:
            got = passes[0]()
            errors = [candidates.relative_error(g, t) for g, t in zip(got, truth, strict=True)]
            if not max(errors) <= 2 * torch.finfo(candidates.DTYPE).eps:
                return math.inf
            call: Call = captured(passes) if len(passes) > 1 else passes[0]
            call()
            return statistics.median(event_times_us(call, TIMES)) / len(passes)
        except Exception as error:  # compilers fail in many ways, and each costs one tile only
            print(f"  {tuple(tile)}: {brief(error)}", file=sys.stderr, flush=True)
            return math.inf

    best, fastest = search(start, time_us, out_of_time)
    first = times_us[start]
    if best != start and fastest < WORTH * first:
        kinds[probe.kind] = best
    elif before is not None:
        kinds[probe.kind] = before
    else:
        del kinds[probe.kind]
    plans.forget()
    return [first, fastest]


def write_tiles(path: Path, about: Mapping[str, str], found: Mapping[str, Kinds]) -> None:
    """The file that `tiles.tuned` reads."""
    sizes = {
        kernel: {kind: list(tile) for kind, tile in kinds.items()}
        for kernel, kinds in found.items()
        if kinds
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": dict(about), "tiles": sizes}, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


def main(budget_s: float, path: Path | None = None) -> None:
    """Goes through the probes, the time shared among those left, and writes what is faster."""
    device = cuda_device()
    path = path or tiles.TUNED / f"{tiles.device_name(device)}.json"
    deadline = time.monotonic() + budget_s
    about = {
        "command": f"python -m bench tune --budget {budget_s:.0f}",
        **surroundings(),
        **describe(device),
    }
    for done, probe in enumerate(PROBES):
        label = f"{probe.kernel}, {probe.kind}"
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"{label}: left out for want of time", file=sys.stderr)
            continue
        until = time.monotonic() + left / (len(PROBES) - done)
        print(f"{label}: {probe.case}", file=sys.stderr, flush=True)
        try:
            before, after = tune_one(probe, device, lambda until=until: time.monotonic() > until)
        except Exception as error:  # the shipped tile itself does not run
            print(f"{label}: {brief(error)}", file=sys.stderr)
            continue
        about[label] = f"{before:.1f} to {after:.1f} µs"
        write_tiles(path, about, tiles.tuned(device))
    print(f"written: {path.name}, in {path.parent.name}")

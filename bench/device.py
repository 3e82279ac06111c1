"""Timing on a CUDA device, the ceilings it really has, and what it is.

Times are the device's: a sleeping kernel goes first, so that by the time the timed calls run all
of them are queued, and what Python takes to launch them is not in the figure.  Small products are
timed in a CUDA graph that goes round enough copies of the weight that none stays in the L2 cache.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

Call = Callable[[], object]

SLEEP_CYCLES = 20_000_000  # about ten milliseconds
CACHE_BYTES = 50 * 2**20  # of L2, where the driver does not tell
CACHES_OF_WEIGHTS = 3  # a rotation goes through so many times the L2 cache
MOST_COPIES = 128
REPLAYS = 10


class Unavailable(Exception):
    """What was asked for cannot run here; the message names the cure."""


def cuda_device() -> torch.device:
    """The current CUDA device.

    Raises:
        Unavailable: there is none.
    """
    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device: run this on a machine with an NVIDIA GPU")
    return torch.device("cuda", torch.cuda.current_device())


def missing(package: str) -> str:
    """Why a package's peer is left out, or nothing where it can be imported."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def brief(error: BaseException) -> str:
    """An error in one line, for a note beside a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


class Rounds:
    """Times calls in rounds, A B C A B C, so that clocks that drift slow all of them."""

    def __init__(self, calls: dict[str, Call], batch: int = 8) -> None:
        self.calls, self.batch = calls, batch
        self.rounds_us: dict[str, list[list[float]]] = {name: [] for name in calls}

    def run(self, rounds: int, warm_up: int = 3) -> None:
        """Times each call `rounds` times `batch`."""
        for call in self.calls.values():
            for _ in range(warm_up):
                call()
        for _ in range(rounds):
            for name, call in self.calls.items():
                self.rounds_us[name].append(event_times_us(call, self.batch))

    def percentiles_us(self, name: str) -> list[float]:
        """p20, median, p80."""
        return np.percentile(np.concatenate(self.rounds_us[name]), [20, 50, 80]).tolist()

    def ratio(self, name: str, other: str) -> float:
        """The median over the rounds of the ratio of the rounds' medians."""
        pairs = zip(self.rounds_us[name], self.rounds_us[other], strict=True)
        return float(np.median([np.median(mine) / np.median(theirs) for mine, theirs in pairs]))


def event_times_us(call: Call, count: int) -> list[float]:
    """Device times of `count` calls that follow one another without a gap."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda._sleep(SLEEP_CYCLES)
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [1e3 * before.elapsed_time(after) for before, after in pairwise(marks)]


def host_us(call: Call, count: int = 20) -> float:
    """What the processor takes to launch one call, the device left behind."""
    torch.cuda.synchronize()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return float(np.median(times))


def captured(calls: Sequence[Call]) -> Call:
    """All the calls, after one warm-up each, as one CUDA graph; returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def copies_for(weight_bytes: int, device: torch.device) -> int:
    """How many weights to go round so that each has left the L2 cache when its turn comes."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", CACHE_BYTES)
    return min(MOST_COPIES, max(2, math.ceil(CACHES_OF_WEIGHTS * cache / weight_bytes)))


def peak_bytes(call: Call) -> int:
    """The most memory that one call holds beyond what was held before."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device: torch.device, size: int = 2**31) -> float:
    """Bytes/s of a large device-to-device copy, reads and writes together."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = event_times_us(lambda: target.copy_(source), REPLAYS)
    return 2 * size / (1e-6 * float(np.median(times)))


def matrix_rate(device: torch.device, size: int = 8192) -> float:
    """Operations/s of PyTorch's own bfloat16 product of [size, size] matrices."""
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    right = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(left)
    times = event_times_us(lambda: torch.mm(left, right, out=out), REPLAYS + 2)[2:]
    return 2 * size**3 / (1e-6 * float(np.median(times)))


def describe(device: torch.device) -> dict[str, str]:
    """What a figure depends on beside the code."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "GPU": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory, GiB": f"{properties.total_memory / 2**30:.0f}",
        "driver": _driver(),
        "CUDA": str(torch.version.cuda),
        "triton": triton.__version__,
    }


def _driver() -> str:
    """The driver's version, where its tool tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.splitlines()[0].strip() if answer.stdout else "unknown"

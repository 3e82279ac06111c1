"""Timing of candidates against one another, and what each keeps for its backward."""

import platform
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

Step = Callable[[], None]


def training_step(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Step:
    """Forward and backward, with fresh gradients."""
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def step() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        layer(x).backward(dy)

    return step


class Interleaved:
    """Times candidates in rounds, A B C A B C, so that what disturbs the machine disturbs all.

    Ratios are medians over the rounds of the ratio within a round, hence steadier than a ratio of
    medians.  A benchmark fixture times the rounds; this times what is inside.
    """

    def __init__(self, steps: dict[str, Step]) -> None:
        self.steps = steps
        self.times_ms: dict[str, list[float]] = {name: [] for name in steps}

    def warm_up(self, rounds: int) -> None:
        for _ in range(rounds):
            for step in self.steps.values():
                step()

    def round(self) -> None:
        for name, step in self.steps.items():
            start = time.perf_counter()
            step()
            self.times_ms[name].append(1e3 * (time.perf_counter() - start))

    def percentiles_ms(self, name: str) -> list[float]:
        """p20, median, p80."""
        return np.percentile(self.times_ms[name], [20, 50, 80]).tolist()

    def ratio(self, name: str, other: str) -> float:
        return float(np.median(np.divide(self.times_ms[name], self.times_ms[other])))


def saved_bytes(layer: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that autograd holds between forward and backward, beside x and the parameters."""
    known = {each.untyped_storage().data_ptr() for each in [x, *layer.parameters()]}
    held: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # an address is only unique while its tensor lives
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(held.values())


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def surroundings() -> dict[str, str]:
    """What a figure depends on beside the code."""
    return {
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table; floats with two decimals."""
    lines = [list(header)]
    lines.append(["---"] * len(lines[0]))
    lines += [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

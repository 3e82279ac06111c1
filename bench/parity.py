"""Every schedule in Triton's interpreter, forward and backward, against the specification.

Small odd shapes in float32, float16 and bfloat16.  The truth is `fedalt_kernels.reference` in
float64, differentiated by autograd; errors are Frobenius norms of differences over the truth's.  A
schedule passes if it errs at most twice as much as the same reference does in the same dtype, and
`eps / 8` of the dtype on top.

    python -m bench parity
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from .measure import markdown

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALING, SEED = 1.7, 77
GRADIENTS = ("dX", "dG", "dA", "dB")


class Shape(NamedTuple):
    """M tokens, N outputs, K inputs, the adapters' ranks, and p of the dropout."""

    m: int
    n: int
    k: int
    ranks: tuple[int, ...]
    dropout: float


# Odd sizes take the pointer path, multiples of eight the descriptors'.
SHAPES = (Shape(37, 72, 80, (3, 5), 0.0), Shape(45, 73, 83, (4, 4), 0.25))


class Inputs(NamedTuple):
    """Of one shape: x, W and dY in the dtype, the parameters in float32."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    downs: list[Tensor]
    ups: list[Tensor]
    mixer: Tensor


def inputs_of(shape: Shape, dtype: torch.dtype) -> Inputs:
    """Random values, the same for one shape and dtype."""
    torch.manual_seed(0)
    m, n, k, ranks, _ = shape
    return Inputs(
        torch.randn(m, k).to(dtype),
        (torch.randn(n, k) / k**0.5).to(dtype),
        torch.randn(m, n).to(dtype),
        [torch.randn(r, k) / k**0.5 for r in ranks],
        [torch.randn(n, r) / r**0.5 for r in ranks],
        torch.randn(len(ranks), k) / k**0.5,
    )


def specified(inputs: Inputs, dtype: torch.dtype, dropout: float) -> list[Tensor]:
    """y, dX, dG, and dA and dB of the first adapter, by autograd over the specification."""
    from fedalt_kernels import Adapter
    from fedalt_kernels.reference import reference

    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).requires_grad_()

    x, mixer = wide(inputs.x.clone()), wide(inputs.mixer.clone())
    downs, ups = [wide(a.clone()) for a in inputs.downs], [wide(b.clone()) for b in inputs.ups]
    adapters = [Adapter(*pair) for pair in zip(downs, ups, strict=True)]
    y = reference(
        x,
        inputs.weight.to(dtype),
        None,
        adapters,
        mixer,
        scaling=SCALING,
        dropout_p=dropout,
        seed=SEED,
    )
    wanted = [x, mixer, downs[0], ups[0]]
    return [y.detach(), *torch.autograd.grad(y, wanted, inputs.dy.to(dtype))]


def rows_of(shape: Shape, dtype: torch.dtype) -> list[dict[str, object]]:
    """One row a schedule and direction."""
    from fedalt_kernels import fused
    from fedalt_kernels.adapter import Branches
    from fedalt_kernels.checks import SCHEDULES
    from fedalt_kernels.dropout import drop_threshold, keep_scale
    from fedalt_kernels.triton import tiles

    inputs = inputs_of(shape, dtype)
    truth = specified(inputs, torch.float64, shape.dropout)
    eager = specified(inputs, dtype, shape.dropout)
    threshold = drop_threshold(shape.dropout)
    seed = torch.tensor(SEED) if threshold else None
    branches = Branches(
        inputs.downs,
        inputs.ups,
        inputs.mixer,
        None,
        SCALING * keep_scale(threshold),
        threshold,
        seed,
    )
    others = [False] * (len(shape.ranks) - 1)
    needs = [True, True, True, *others, True, *others]
    ranks = tiles.side_by_side(shape.ranks, dtype)

    def serve(backward: bool) -> list[str]:
        return [
            schedule
            for schedule in SCHEDULES
            if not tiles.unserved(schedule, inputs.x, ranks, threshold > 0, backward=backward)
        ]

    made = {
        schedule: fused.forward(inputs.x, inputs.weight, None, branches._replace(schedule=schedule))
        for schedule in serve(False)
    }
    found = [("forward", s, ("y",), [y], truth[:1], eager[:1]) for s, (y, *_) in made.items()]
    _, low, gates, *_ = made["split"]
    for schedule in serve(True):
        forced = branches._replace(schedule=schedule)
        grads = fused.backward(inputs.dy, inputs.x, inputs.weight, low, gates, forced, needs)
        found.append(("backward", schedule, GRADIENTS, grads, truth[1:], eager[1:]))
    floor = torch.finfo(dtype).eps / 8
    rows = []
    for direction, schedule, labels, got, true, own in found:
        errors = [_error(g, t) for g, t in zip(got, true, strict=True)]
        eagers = [_error(o, t) for o, t in zip(own, true, strict=True)]
        limits = [2 * each + floor for each in eagers]
        passed = all(error <= limit for error, limit in zip(errors, limits, strict=True))
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "M, N, K": f"{shape.m}, {shape.n}, {shape.k}",
                "ranks": " ".join(map(str, shape.ranks)),
                "dropout": str(shape.dropout),
                "direction": direction,
                "schedule": schedule,
                "error": _listed(labels, errors),
                "eager PyTorch's": _listed(labels, eagers),
                "": "" if passed else "FAILS",
            }
        )
    return rows


def _error(mine: Tensor, true: Tensor) -> float:
    return ((mine.double() - true).norm() / true.norm()).item()


def _listed(labels: tuple[str, ...], values: list[float]) -> str:
    return ", ".join(f"{label} {value:.1e}" for label, value in zip(labels, values, strict=True))


def main() -> int:
    """Print the table; 1 if a schedule fails, else 0."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        # It is read when the kernels are imported, which this process may have done already.
        command = [sys.executable, "-m", "bench", "parity"]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    rows = [row for dtype in DTYPES for shape in SHAPES for row in rows_of(shape, dtype)]
    failed = sum(row[""] != "" for row in rows)
    print(markdown(rows[0], [row.values() for row in rows]))
    print(f"{len(rows) - failed} of {len(rows)} within 2 x eager's error + eps / 8")
    return 1 if failed else 0

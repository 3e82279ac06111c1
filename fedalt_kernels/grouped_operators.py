"""What serves many clients as operators, which torch.compile calls without looking inside."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, library

from . import grouped
from .adapter import Branches
from .operators import BRANCHES, COUNT, PACKED, apart, base_of, split
from .quantized import QuantizedWeight
from .segments import Segments

# Segments may be of fewer rows than x has, as a user names them.
_SEGMENTS = "SymInt[] sizes, Tensor? order, Tensor? inverse"
_SIZES = len(Segments._fields)
_FORWARD = (
    f"(Tensor x, Tensor? weight, Tensor? bias, {BRANCHES}, {_SEGMENTS}, {PACKED})"
    " -> (Tensor y, Tensor low, Tensor gates)"
)
_BACKWARD = (
    f"(Tensor dy, Tensor x, Tensor? weight, Tensor low, Tensor gates, {BRANCHES}, {_SEGMENTS}, "
    f"bool[] needs, {PACKED}) -> Tensor[]"
)
_NAMES = {"torch": "grouped", "triton": "grouped_fused"}


def module(impl: str) -> Any:
    """The implementation of "torch" or "triton"."""
    if impl == "torch":
        return grouped
    from . import grouped_fused  # only here, since it needs Triton

    return grouped_fused


def _parted(x: Tensor, rest: Sequence[Any]) -> tuple[Branches, Segments, Sequence[Any]]:
    """Branches, segments of x's rows, and what follows them."""
    branches, (sizes, order, inverse) = Branches(*rest[:COUNT]), rest[COUNT : COUNT + _SIZES]
    segments = Segments(tuple(sizes), order, inverse).of_rows(x.shape[0], x.device)
    return branches, segments, rest[COUNT + _SIZES :]


def _run_forward(
    impl: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    branches, segments, packed = _parted(x, rest)
    y, low, gates = module(impl).forward(x, base_of(weight, packed), bias, branches, segments)
    return y, low, x.new_empty(0) if gates is None else gates


def _run_backward(
    impl: str, dy: Tensor, x: Tensor, weight: Tensor | None, low: Tensor, gates: Tensor, *rest: Any
) -> list[Tensor]:
    branches, segments, (needs, *packed) = _parted(x, rest)
    held = None if branches.mixer is None else gates
    base = base_of(weight, packed)
    grads = module(impl).backward(dy, x, base, low, held, branches, segments, needs)
    return apart(grads, needs)


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    branches = Branches(*rest[:COUNT])
    low, gates = grouped.beside(x, branches)
    y = x.new_empty(x.shape[0], base_of(weight, rest[COUNT + _SIZES :]).shape[0])
    return y, low, x.new_empty(0) if gates is None else gates


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, low: Tensor, gates: Tensor, *rest: Any
) -> list[Tensor]:
    branches, needs = Branches(*rest[:COUNT]), rest[COUNT + _SIZES]
    inputs = [x, branches.mixer, *branches.downs, *branches.ups]
    return [
        torch.empty(source.shape, dtype=source.dtype, device=source.device)
        for source, need in zip(inputs, needs, strict=True)
        if need
    ]


def _forward(
    name: str,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    branches: Branches,
    segments: Segments,
) -> tuple[Tensor, Tensor, Tensor | None]:
    operator = getattr(torch.ops.fedalt_kernels, f"{name}_forward")
    matrix, packed = split(weight)
    y, low, gates = operator(x, matrix, bias, *branches[:COUNT], *segments, *packed)
    return y, low, gates if branches.mixer is not None else None


def _backward(
    name: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    low: Tensor,
    gates: Tensor | None,
    branches: Branches,
    segments: Segments,
    needs: Sequence[bool],
) -> list[Tensor]:
    operator = getattr(torch.ops.fedalt_kernels, f"{name}_backward")
    held = low.new_empty(0) if gates is None else gates
    matrix, packed = split(weight)
    return operator(dy, x, matrix, low, held, *branches[:COUNT], *segments, needs, *packed)


def _register(impl: str, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    for half, schema, run, fake in (
        ("forward", _FORWARD, _run_forward, _fake_forward),
        ("backward", _BACKWARD, _run_backward, _fake_backward),
    ):
        operator = f"fedalt_kernels::{name}_{half}"
        library.define(operator, schema)
        library.impl(operator, "CompositeExplicitAutograd", partial(run, impl))
        library.register_fake(operator, fake)
    return partial(_forward, name), partial(_backward, name)


OPERATORS = {impl: _register(impl, name) for impl, name in _NAMES.items()}
"""Forward and backward of each implementation, with the signatures of `grouped`."""

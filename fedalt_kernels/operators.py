"""Both implementations as operators, which torch.compile calls without looking inside."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, library

from . import merged
from .adapter import Branches
from .quantized import QuantizedWeight

BRANCHES = (
    "Tensor[] downs, Tensor[] ups, Tensor? mixer, float[]? weights, float scaling, int threshold, "
    "Tensor? seed, str? schedule"
)
# A quantized weight comes last, in the order of its fields, and then `weight` is None.
PACKED = "str? kind=None, int[]? shape=None, Tensor[]? tensors=None, int[]? blocks=None"
_FORWARD = (
    f"(Tensor x, Tensor? weight, Tensor? bias, {BRANCHES}, {PACKED})"
    " -> (Tensor y, Tensor low, Tensor gates)"
)
_BACKWARD = (
    f"(Tensor dy, Tensor x, Tensor? weight, Tensor low, Tensor gates, {BRANCHES}, bool[] needs, "
    f"{PACKED}) -> Tensor[]"
)
COUNT = len(Branches._fields) - 1  # a kind of call is for eager calls
_NAMES = {"torch": "merged", "triton": "fused"}


@cache
def module(impl: str) -> Any:
    """The implementation of "torch" or "triton"."""
    if impl == "torch":
        return merged
    from . import fused  # only here, since it needs Triton

    return fused


def base_of(weight: Tensor | None, packed: Sequence[Any]) -> Tensor | QuantizedWeight:
    if weight is not None:
        return weight
    kind, (n, k), tensors, blocks = packed
    return QuantizedWeight(kind, (n, k), tuple(tensors), tuple(blocks))


def _run_forward(
    impl: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    branches, base = Branches(*rest[:COUNT]), base_of(weight, rest[COUNT:])
    y, low, gates, *_ = module(impl).forward(x, base, bias, branches)
    return y, low, x.new_empty(0) if gates is None else gates


def _run_backward(
    impl: str, dy: Tensor, x: Tensor, weight: Tensor | None, low: Tensor, gates: Tensor, *rest: Any
) -> list[Tensor]:
    mixed, needs, *packed = Branches(*rest[:COUNT]), *rest[COUNT:]
    held = None if mixed.mixer is None else gates
    grads = module(impl).backward(dy, x, base_of(weight, packed), low, held, mixed, needs)
    return apart(grads, needs)


def apart(grads: list[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """An operator's outputs must not share storage; gradients cut from one product do."""
    return [
        grad if i == 0 and needs[0] else grad.clone(memory_format=torch.contiguous_format)
        for i, grad in enumerate(grads)
    ]


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mixed = Branches(*rest[:COUNT])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rank = sum(a.shape[0] for a in mixed.downs)
    y = x.new_empty(x.shape[0], base_of(weight, rest[COUNT:]).shape[0])
    low = x.new_empty(x.shape[0], rank)
    if mixed.mixer is None:
        return y, low, x.new_empty(0)
    return y, low, x.new_empty(x.shape[0], len(mixed.downs), dtype=wide)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, low: Tensor, gates: Tensor, *rest: Any
) -> list[Tensor]:
    mixed, needs = Branches(*rest[:COUNT]), rest[COUNT]
    inputs = [x, mixed.mixer, *mixed.downs, *mixed.ups]
    return [
        torch.empty(source.shape, dtype=source.dtype, device=source.device)
        for source, need in zip(inputs, needs, strict=True)
        if need
    ]


def split(weight: Tensor | QuantizedWeight) -> tuple[Tensor | None, tuple[Any, ...]]:
    """A weight as the operators take it: the matrix, or the fields of a quantized one."""
    return (weight, ()) if isinstance(weight, Tensor) else (None, tuple(weight))


def _forward(
    name: str,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    branches: Branches,
) -> tuple[Tensor, Tensor, Tensor | None]:
    operator = getattr(torch.ops.fedalt_kernels, f"{name}_forward")
    matrix, packed = split(weight)
    y, low, gates = operator(x, matrix, bias, *branches[:COUNT], *packed)
    return y, low, gates if branches.mixer is not None else None


def _backward(
    name: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    low: Tensor,
    gates: Tensor | None,
    branches: Branches,
    needs: Sequence[bool],
) -> list[Tensor]:
    operator = getattr(torch.ops.fedalt_kernels, f"{name}_backward")
    held = low.new_empty(0) if gates is None else gates
    matrix, packed = split(weight)
    return operator(dy, x, matrix, low, held, *branches[:COUNT], needs, *packed)


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
"""Forward and backward of each implementation, with the signatures of `merged`."""

"""The derivative of the layer for many clients, and what is kept for it.

Kept for the backward: x, P and g, as for one client, the latter two with their rows sorted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import grouped_operators
from .adapter import Branches, Factors, rows_of
from .autograd import without_autocast
from .dispatch import undifferentiated
from .quantized import QuantizedWeight
from .segments import Segments


class GroupedCall(NamedTuple):
    """What a call takes beside the tensors that may want a gradient."""

    constants: tuple[Any, ...]  # of its kind, see `kinds.Kind`
    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    segments: Segments
    seeds: Tensor | None  # int64 [C], None without dropout


class GroupedMixedLoRA(torch.autograd.Function):
    """``apply(call, x, mixer, *factors)``: factors are every a [C, r_e, K], then every b."""

    @staticmethod
    def forward(
        ctx: Any, call: GroupedCall, x: Tensor, mixer: Tensor | None, *factors: Tensor
    ) -> Tensor:
        constants, weight, bias, segments, seeds = call
        forward, _ = _implementation(constants[0])
        branches = _branches(constants, mixer, seeds, factors)
        with undifferentiated():
            y, low, gates = forward(rows_of(x), weight, bias, branches, segments)
        ctx.constants, ctx.sizes = constants, segments.sizes
        base = (weight,) if isinstance(weight, Tensor) else weight.tensors
        sorting = segments.order, segments.inverse
        ctx.save_for_backward(x, low, gates, mixer, seeds, *sorting, *factors, *base)
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, low, gates, mixer, seeds, order, inverse, *rest = ctx.saved_tensors
        _, count, *_, layout, _ = ctx.constants
        factors, base = rest[: 2 * count], rest[2 * count :]
        weight: Any = base[0]
        if layout is not None:
            kind, shape, blocks = layout
            weight = QuantizedWeight(kind, shape, tuple(base), blocks)
        branches = _branches(ctx.constants, mixer, seeds, factors)
        segments, needs = Segments(ctx.sizes, order, inverse), ctx.needs_input_grad[1:]
        _, backward = _implementation(ctx.constants[0])
        with without_autocast(x.device.type):
            drows = dy.reshape(-1, weight.shape[0]).contiguous()
            found = backward(drows, rows_of(x), weight, low, gates, branches, segments, needs)
            grads = iter(found)
            dx, *others = [next(grads) if need else None for need in needs]
        return None, None if dx is None else dx.view(x.shape), *others


def _branches(
    constants: tuple[Any, ...], mixer: Tensor | None, seeds: Tensor | None, factors: Factors
) -> Branches:
    _, count, weights, scaling, threshold, *_ = constants
    return Branches(factors[:count], factors[count:], mixer, weights, scaling, threshold, seeds)


def _implementation(impl: str) -> Sequence[Any]:
    """Forward and backward, as operators where torch.compile is tracing."""
    if torch.compiler.is_compiling():
        return grouped_operators.OPERATORS[impl]
    module = grouped_operators.module(impl)
    return module.forward, module.backward

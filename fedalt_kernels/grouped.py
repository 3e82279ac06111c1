"""The layer for the rows of many clients: one base product for all, narrow products for each.

Symbols as in `autograd.py`, whose equations hold for each client's rows.  With the rows sorted by
client, m_c of them client c's::

    y = x Wᵀ        [M, N], all rows at once        dX = dY W        [M, K], likewise

and each client's adapters are added to its segments of both in place, with nothing padded.  Kept
for the backward: x, P and g, as for one client.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from . import merged
from .adapter import Branches, Factors, rows_of
from .autograd import without_autocast
from .dispatch import undifferentiated
from .quantized import QuantizedWeight, dense
from .segments import Segments


class GroupedCall(NamedTuple):
    """What a call takes beside the tensors that may want a gradient."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    segments: Segments  # of the M rows of x
    seeds: Sequence[int] | None  # C, None without dropout
    weights: Sequence[float] | None  # E fixed gates
    scaling: float  # the dropout's keep scale included
    threshold: int

    def branches(self, mixer: Tensor | None, factors: Factors) -> list[Branches]:
        """Every client's own, of stacked tensors."""
        half = len(factors) // 2
        each = list(zip(*(factor.unbind() for factor in factors), strict=True))
        mixers = [None] * len(each) if mixer is None else mixer.unbind()
        seeds = [None] * len(each) if self.seeds is None else [torch.tensor(s) for s in self.seeds]
        settings = self.weights, self.scaling, self.threshold
        return [
            Branches(own[:half], own[half:], gates, *settings, seed)
            for own, gates, seed in zip(each, mixers, seeds, strict=True)
        ]


class GroupedMixedLoRA(torch.autograd.Function):
    """``apply(call, x, mixer, *factors)``: factors are every a [C, r_e, K], then every b."""

    @staticmethod
    def forward(
        ctx: Any, call: GroupedCall, x: Tensor, mixer: Tensor | None, *factors: Tensor
    ) -> Tensor:
        with undifferentiated():
            rows = call.segments.sort(rows_of(x))
            branches = call.branches(mixer, factors)
            y = linear(rows, dense(call.weight, x.dtype))  # [M, K] [K, N]
            kept = [
                merged.add_adapters(y[part], rows[part], call.bias, branches[client])
                for client, part in call.segments.slices()
            ]
            y = call.segments.restore(y)
        ctx.call = call
        ctx.save_for_backward(x, mixer, *factors, *(each for pair in kept for each in pair))
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad[1:]
        x, mixer, *rest = ctx.saved_tensors
        count = len(needs) - 2
        factors, kept = rest[:count], iter(rest[count:])
        with without_autocast(x.device.type):
            rows = call.segments.sort(rows_of(x))
            drows = call.segments.sort(dy.reshape(-1, call.weight.shape[0])).contiguous()
            branches = call.branches(mixer, factors)
            dx = drows @ dense(call.weight, x.dtype) if needs[0] else None  # [M, N] [N, K]
            wanted = [i for i in range(1, len(needs)) if needs[i]]
            stacked = {i: torch.zeros_like((x, mixer, *factors)[i]) for i in wanted}
            for client, part in call.segments.slices():
                inputs = drows[part], rows[part], next(kept), next(kept), branches[client], needs
                dpart = None if dx is None else dx[part]
                found = merged.add_gradients(dpart, *inputs)[0 if dx is None else 1 :]
                for i, grad in zip(wanted, found, strict=True):
                    stacked[i][client].copy_(grad)
            if dx is not None:
                dx = call.segments.restore(dx).view(x.shape)
        return None, dx, *(stacked.get(i) for i in range(1, len(needs)))

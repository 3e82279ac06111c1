"""Backward plans of the Triton implementation: at most two launches without dropout.

The first makes dP and dl, and dX with them (`overlapped`) or in a launch of its own; the last makes
the sums over tokens, dA, dG and dB, in the dtype of their parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from .adapter import Branches
from .fused_forward import fixed_weights, ranks_of
from .quantized import QuantizedWeight
from .triton import hopper, tiles
from .triton.backward import spreading
from .triton.contract import contracting
from .triton.dropout import masking
from .triton.overlapped_backward import overlapping_backward
from .triton.pack import packing
from .triton.reduce import reducing
from .triton.tiles import Ranks, Span
from .weights import matrix, outline

MOST_JOINT_RANKS = 16  # of dB made with dP: more shares would weigh as much as a read of dY


def plan_backward(
    dy: Tensor,
    x: Tensor,
    base: Tensor | QuantizedWeight,
    branches: Branches,
    needs: Sequence[bool],
) -> Callable[..., list[Tensor]]:
    """Plans the gradients that `needs` asks for; arguments are those of `fused.backward`."""
    ranks, weights, scaling = ranks_of(branches, x.dtype), fixed_weights(branches), branches.scaling
    count, gated, dropout = len(branches.downs), branches.mixer is not None, branches.threshold > 0
    needs_x, needs_mixer = needs[:2]
    needs_downs, needs_ups = needs[2 : 2 + count], needs[2 + count :]
    dtype = gradient_dtype(branches, needs)
    ups, downs = span_of(ranks, needs_ups), span_of(ranks, needs_downs)
    if downs is None and needs_mixer:
        downs = Span(0, ranks.block, 0)
    like = outline(base, x.dtype)
    shape = hopper.backward_shape(like, branches, needs)
    if needs_x and hopper.serves_backward(dy, x, like, branches, shape):
        return _plan_hopper(dy, x, like, branches, shape, needs, dtype)
    joint = ups if downs is not None and _is_joint(ups, ranks) else None

    schedule = branches.schedule
    if schedule in (None, "hopper") or tiles.unserved(schedule, dy, ranks, dropout, backward=True):
        schedule = tiles.backward_schedule(dy, like, ranks, dropout)
    overlapped, expand = needs_x and schedule == "overlapped", schedule == "expand"
    overlap = spread = contract = reduce_down = reduce_up = pack = mask = None
    shares = 0
    if overlapped:
        overlap, shares = overlapping_backward(dy, like, gated, weights, ranks, scaling, joint)
    elif needs_x or downs is not None:
        spread, shares = spreading(dy, gated, weights, ranks, scaling, joint)
    if needs_x and not overlapped:
        contract = contracting(
            dy, like, ranks, backward=True, gated=gated, dropout=dropout, base=not expand
        )
    if overlap or spread:
        pack = packing(x, [like.shape[0]], branches, ranks)
        mask = masking(x.shape[0], x.shape[1], branches.threshold) if dropout else None
    if downs is not None:
        reduce_down = reducing(
            x,
            ranks.padded,
            gated and needs_mixer,
            (1.0,) * count,
            ranks,
            1.0,
            downs,
            dtype,
            makes_up=False,
            dropout=dropout,
            joint=(shares, dy.shape[1], joint) if joint else None,
        )
    if ups is not None and joint is None:
        reduce_up = reducing(
            dy, ranks.edges[-1], gated, weights, ranks, scaling, ups, dtype, makes_up=True
        )

    edges, n = ranks.edges, dy.shape[1]
    first_down, below, _ = downs or Span(0, 0, 0)
    first_up = ups.first if ups else 0
    wanted_downs = [e for e, need in enumerate(needs_downs) if need]
    wanted_ups = [e for e, need in enumerate(needs_ups) if need]

    def run(
        dy: Tensor,
        x: Tensor,
        base: Any,
        low: Tensor,
        gates: Tensor | None,
        branches: Branches,
        down: Any,
        up: Any,
    ) -> list[Tensor]:
        grads: list[Tensor] = []
        dlow: Any = None
        dlogits = dup = words = None
        rows: Any = None
        flat: Any = None
        weight: Any = matrix(base, x.dtype) if needs_x else None
        mixer: Any = None if branches.mixer is None else branches.mixer.contiguous()
        if pack and (up is None or up.dim() == 2):  # kept by Hopper's kernels
            down, _, up = pack(x, (branches,)).of(0)
        if mask:
            words = mask(branches.seed)  # type: ignore[arg-type]
        if overlap:
            dx, dlow, dlogits, dup = overlap(dy, weight, down, up, mixer, low, gates)
            grads.append(dx)
        elif spread:
            dlow, dlogits, dup = spread(dy, up, low, gates)
        if contract:
            ready = dy @ weight if expand else None  # [M, N] [N, K]
            grads.append(contract(dy, weight, dlow, down, None, dlogits, mixer, words, ready))
        if reduce_down:
            dlogits = dlogits if needs_mixer else None
            rows, flat = reduce_down(x, dlow, dlogits, words, dup)
        if reduce_up:
            _, flat = reduce_up(dy, low, gates)
        if needs_mixer:
            mine = rows[below : below + count]
            grads.append(mine.to(mixer.dtype))
        for e in wanted_downs:
            mine = rows[edges[e] - first_down : edges[e + 1] - first_down]
            grads.append(mine.to(branches.downs[e].dtype))
        for e in wanted_ups:
            mine = flat[n * (edges[e] - first_up) : n * (edges[e + 1] - first_up)]
            grads.append(mine.view(n, -1).to(branches.ups[e].dtype))
        return grads

    return run


def _plan_hopper(
    dy: Tensor,
    x: Tensor,
    like: Tensor,
    branches: Branches,
    shape: Any,
    needs: Sequence[bool],
    dtype: torch.dtype,
) -> Callable[..., list[Tensor]]:
    mix = hopper.mixing_backward(dy, x, like, branches, shape, fixed_weights(branches), dtype)
    wanted = [e for e, need in enumerate(needs[2:]) if need]
    count, edges, (n, k) = shape.E, shape.EDGES, like.shape
    above, below = k * count * shape.MIXER, k * shape.BELOW

    def run(
        dy: Tensor,
        x: Tensor,
        base: Any,
        low: Tensor,
        gates: Tensor | None,
        branches: Branches,
        side: Any,
        up: Any,
    ) -> list[Tensor]:
        weight = matrix(base, x.dtype)
        dx, out = mix(dy, x, weight, low, gates, branches, side, up)
        grads = [dx]
        if shape.MIXER:
            grads.append(_cut(out, 0, branches.mixer))
        for e in wanted:
            if e < count:
                start = above + k * (edges[e] - shape.DOWNS[0])
                grads.append(_cut(out, start, branches.downs[e]))
            else:
                start = below + n * (edges[e - count] - shape.UPS[0])
                grads.append(_cut(out, start, branches.ups[e - count]))
        return grads

    return run


def _cut(out: Any, start: int, like: Any) -> Tensor:
    """The gradient of a parameter, which begins there."""
    return out[start : start + like.numel()].view(like.shape).to(like.dtype)


def gradient_dtype(branches: Branches, needs: Sequence[bool]) -> torch.dtype:
    """That of all the parameters that want a gradient, or float32 where theirs differ."""
    tensors = branches.mixer, *branches.downs, *branches.ups
    dtypes = {t.dtype for t, need in zip(tensors, needs[1:], strict=True) if need and t is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _is_joint(span: Span | None, ranks: Ranks) -> bool:
    """Whether dB of a span comes of the pass over dY that makes dP."""
    few = span is not None and span.width <= MOST_JOINT_RANKS
    return few and ranks.padded <= tiles.WIDE_RANKS


def span_of(ranks: Ranks, needs: Sequence[bool]) -> Span | None:
    """The ranks from the first needed adapter to the last one, padded; None where none is."""
    needed = [e for e, need in enumerate(needs) if need]
    if not needed:
        return None
    first, last = ranks.edges[needed[0]], ranks.edges[needed[-1] + 1]
    width = max(16, next_power_of_2(last - first))
    if width > ranks.block:
        width = cdiv(last - first, ranks.block) * ranks.block
    return Span(first, width, last)

"""The Triton implementation: forward and backward as schedules of a few kernels.

The symbols are those of `reference.py`, the equations those of `autograd.py`.  R = Σ r_e, padded
to RANKS.  `_pack` lays the adapters side by side once a pass, s multiplied into the up-projections;
then, forward:

==========  ======================================================================  ==============
decode      one launch: slices of P, meanwhile W streams; reads adapters unpacked   M ≤ 64
recompute   one launch: the narrow products inside the base product's loop          few tiles
hopper      one persistent launch in Gluon, `triton.hopper`; backward likewise      sm_90, proven
overlapped  one persistent launch: blocks of S first, tiles of y need them last     sm_90, sm_100
split       `_project` makes S, `_contract` takes S Bᵀ as a step of the product     any
expand      `_project`; cuBLAS makes x Wᵀ, `_contract` adds S Bᵀ to it              float32, odd
==========  ======================================================================  ==============

The last column is what a schedule is chosen for (`tiles.forward_schedule`, and
`hopper.serves_forward` before it); what it cannot serve is in `tiles.unserved`.  Backward:
overlapped, split and expand likewise, with dP for S; the sums over tokens, dA with dG and dB, are
launches of their own, but for dB of few ranks: its shares are made in the pass over dY that makes
dP, and added up beside dA.  Under dropout the mask is made once as bits.

Decode reads a quantized weight as it is stored; for the others it is first written out, into memory
that all layers share.

Schedules, tiles, grids and constants are settled once for every kind of call, as a plan: a function
that allocates and launches.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .adapter import Branches
from .fused_backward import plan_backward
from .fused_forward import Forward, Strip, plan_forward, plan_strips
from .plans import Plans
from .quantized import QuantizedWeight
from .triton import tiles
from .triton.tiles import side_by_side
from .weights import outline

_forwards: Plans[Callable[..., Forward]] = Plans()
_backwards: Plans[Callable[..., list[Tensor]]] = Plans()


def forward(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    branches: Branches,
    strip: Strip | None = None,
) -> Forward:
    """Returns y [M, N], P [M, R] in x's dtype, the gates [M, E] (None without a mixer), and what it
    has packed.

    Args:
        x: [M, K], rows contiguous.
        weight: [N, K], one of its strides 1, dtype of x; or quantized.
        bias: [N] or None, dtype of x.
        branches: the adapters and how to mix them.
        strip: from `shared_strips`, where the layer shares its pass over x.
    """
    key = (rows_kind(x), _beside(branches, weight), bias is None, strip is None)
    plan = _forwards.get(key) or _forwards.made(
        key, lambda: plan_forward(x, weight, bias is not None, branches, strip is not None)
    )
    return launched(x, plan, x, weight, bias, branches, strip)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    low: Tensor,
    gates: Tensor | None,
    branches: Branches,
    needs: Sequence[bool],
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> list[Tensor]:
    """Returns the gradients that `needs` asks for, in its order: x, mixer, every A_e, every B_e.

    Arguments as of `merged.backward`, and the packed adapters where the forward has kept them.  A
    schedule that has no backward leaves the choice open.
    """
    key = (rows_kind(dy), rows_kind(x), _beside(branches, weight), tuple(needs))
    plan = _backwards.get(key) or _backwards.made(
        key, lambda: plan_backward(dy, x, weight, branches, needs)
    )
    return launched(x, plan, dy, x, weight, low, gates, branches, down, up)


def shared_strips(
    x: Tensor, outputs: Sequence[int], first: Branches
) -> Callable[[Tensor, Sequence[Branches]], list[Strip]]:
    """Plans S of several layers that read such an x and differ only in values and outputs."""
    plan = plan_strips(x, outputs, first)
    return lambda x, layers: launched(x, plan, x, layers)


def worth_sharing(
    x: Tensor, weights: Sequence[Tensor | QuantizedWeight], sizes: Sequence[int], dropout: bool
) -> bool:
    """Whether one pass over x for several layers beats each layer's own schedule.

    It does where a layer would make its strip in a launch of its own anyway, or is so narrow that
    its own tiles cannot hide one.
    """
    ranks = side_by_side(sizes, x.dtype)
    outlines = [outline(weight, x.dtype) for weight in weights]
    schedules = {tiles.forward_schedule(x, like, ranks, dropout) for like in outlines}
    if schedules & {"decode", "recompute"}:
        return False
    return schedules != {"overlapped"} or any(n < k for n, k in (w.shape for w in weights))


def launched(like: Tensor, plan: Callable[..., Any], *arguments: Any) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    if like.device.type == "cpu" or like.device.index == torch.cuda.current_device():
        return plan(*arguments)
    with torch.cuda.device_of(like):
        return plan(*arguments)


def rows_kind(x: Tensor) -> Hashable:
    """What plans depend on of a matrix with contiguous rows."""
    exact = x.dtype is torch.float32 and torch.get_float32_matmul_precision()
    return x.dtype, x.device, x.shape, x.stride(0), x.data_ptr() % 16, exact


def base_kind(weight: Tensor | QuantizedWeight) -> Hashable:
    if isinstance(weight, Tensor):
        return weight.shape, weight.stride(), weight.data_ptr() % 16
    return weight.kind, weight.shape, weight.blocks


def _beside(branches: Branches, weight: Tensor | QuantizedWeight) -> Hashable:
    """What they depend on of all else but the addresses."""
    if branches.kind is None:
        return base_kind(weight), _adapters(branches)
    return branches.kind, isinstance(weight, Tensor) and weight.data_ptr() % 16


def _adapters(branches: Branches) -> Hashable:
    downs, ups, mixer, weights, scaling, threshold, _, schedule, _ = branches
    return (
        *[(a.shape[0], a.dtype, b.dtype) for a, b in zip(downs, ups, strict=True)],
        None if mixer is None else mixer.dtype,
        None if weights is None else tuple(weights),
        scaling,
        threshold,
        schedule,
    )

"""The Triton implementation: forward and backward as schedules of a few kernels.

The symbols are those of `reference.py`, the equations those of `autograd.py`.  R = Σ r_e, padded
to RANKS.  `pack` lays the adapters side by side once a pass, s multiplied into the up-projections;
then, forward:

==========  ======================================================================  ==============
decode      one launch: slices of P, meanwhile W streams; reads adapters unpacked   M ≤ 64
recompute   one launch: the narrow products inside the base product's loop          few tiles
overlapped  one persistent launch: blocks of S first, tiles of y need them last     sm_90, sm_100
split       `project` makes S, `contract` takes S Bᵀ as a step of the base product  any
expand      `project`; cuBLAS makes x Wᵀ, `contract` adds S Bᵀ to it                float32, odd
==========  ======================================================================  ==============

The last column is what a schedule is chosen for (`tiles.forward_schedule`); what it cannot serve is
in `tiles.unserved`.  Backward: overlapped, split and expand likewise, with dP for S; the sums over
tokens, dA with dG and dB, are launches of their own, but for dB of few ranks, which shares the read
of dY that makes dP.  Under dropout the mask is made once as bits, for dX and for dA.

Decode reads a quantized weight as it is stored; for the others it is first written out, into memory
that all layers share.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from .adapter import Branches, Factors
from .quantized import QuantizedWeight
from .triton import tiles
from .triton.backward import spread
from .triton.contract import contract_with_strip
from .triton.decode import decode
from .triton.dropout import mask_words
from .triton.forward import project, recompute
from .triton.overlapped import overlapped
from .triton.overlapped_backward import overlapped_backward
from .triton.pack import pack
from .triton.reduce import reduce_down, reduce_up
from .triton.tiles import Ranks, side_by_side
from .weights import matrix, octets, outline

MOST_JOINT_RANKS = 16  # of dB made with dP: more shares would weigh as much as a read of dY


class Packed(NamedTuple):
    """The adapters of one layer or of several that read one x, laid side by side in x's dtype."""

    down: Tensor  # [L, RANKS, K]
    router: Tensor | None  # [L, 16, K]
    ups: list[Tensor]  # L of [N, RANKS]


class Strip(NamedTuple):
    """What `project` made of x for one layer."""

    low: Tensor  # P [M, R]
    gated: Tensor  # S [M, RANKS]
    gates: Tensor | None  # g [M, E]
    up: Tensor  # [N, RANKS]


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the first tensor's."""

    @wraps(function)
    def run(first: Tensor, *arguments: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *arguments)

    return run


@_on_its_device
def forward(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    branches: Branches,
    strip: Strip | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns y [M, N], P [M, R] in x's dtype, and the gates [M, E] (None without a mixer).

    Args:
        x: [M, K], rows contiguous.
        weight: [N, K], one of its strides 1, dtype of x; or quantized.
        bias: [N] or None, dtype of x.
        branches: the adapters and how to mix them.
        strip: from `shared_strips`, where the layer shares its pass over x.
    """
    ranks = _ranks(branches, x.dtype)
    bias = None if bias is None else bias.contiguous()
    schedule = branches.schedule
    if schedule is None:
        like = outline(weight, x.dtype)
        schedule = tiles.forward_schedule(x, like, ranks, branches.threshold > 0)
    elif reason := tiles.unserved(schedule, x, ranks, branches.threshold > 0):
        raise RuntimeError(f"schedule {schedule!r} cannot serve this call: {reason}")
    quantized = None
    if isinstance(weight, QuantizedWeight) and schedule == "decode":
        quantized = octets(weight)
    weight = matrix(weight, x.dtype) if quantized is None else quantized.data
    if strip is not None:
        return _with_strip(x, weight, bias, strip, ranks, schedule)
    weights = _weights(branches)
    scaling = branches.scaling
    if schedule == "decode":
        downs, ups = _sources(branches.downs), _sources(branches.ups)
        mixer = None if branches.mixer is None else branches.mixer.contiguous()
        return decode(x, weight, bias, downs, ups, mixer, weights, ranks, scaling, quantized)
    packed = _packed(x, [weight.shape[0]], [branches], ranks)
    down, up = packed.down[0], packed.ups[0]
    router = None if packed.router is None else packed.router[0]
    if schedule == "recompute":
        return recompute(x, weight, bias, down, router, up, weights, ranks)
    if schedule == "overlapped":
        seed, threshold = branches.seed, branches.threshold
        return overlapped(x, weight, bias, down, router, up, weights, ranks, seed, threshold)
    strip = _strips(x, packed, [branches], ranks)[0]
    return _with_strip(x, weight, bias, strip, ranks, schedule)


def _with_strip(
    x: Tensor, weight: Tensor, bias: Tensor | None, strip: Strip, ranks: Ranks, schedule: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    base = _near(x) @ weight.t() if schedule == "expand" else None  # [M, K] [K, N]
    y = contract_with_strip(x, weight, strip.gated, strip.up, ranks, bias=bias, base=base)
    return y, strip.low, strip.gates


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


@_on_its_device
def shared_strips(x: Tensor, outputs: Sequence[int], layers: Sequence[Branches]) -> list[Strip]:
    """S of several layers that read one x and differ only in values and outputs, in one pass."""
    ranks = _ranks(layers[0], x.dtype)
    packed = _packed(x, outputs, layers, ranks)
    return _strips(x, packed, layers, ranks)


@_on_its_device
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    low: Tensor,
    gates: Tensor | None,
    branches: Branches,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Returns the gradients that `needs` asks for, in its order: x, mixer, every A_e, every B_e.

    Arguments as of `merged.backward`.  A schedule that has no backward leaves the choice open.
    """
    ranks = _ranks(branches, x.dtype)
    count = len(branches.downs)
    needs_x, needs_mixer = needs[:2]
    needs_downs, needs_ups = needs[2 : 2 + count], needs[2 + count :]
    up_span = _span(ranks, needs_ups)
    grads: list[Tensor] = []
    shares = None
    if needs_x or needs_mixer or any(needs_downs):
        joint = up_span if up_span and up_span[1] <= MOST_JOINT_RANKS else None
        grads, shares = _rows_backward(dy, x, weight, low, gates, branches, ranks, needs, joint)
    if up_span and shares is None:
        weights = _weights(branches)
        shares = reduce_up(dy, low, gates, weights, ranks, branches.scaling, up_span)
    for e, need in enumerate(needs_ups):
        if need and up_span and shares is not None:
            mine = shares[..., ranks.edges[e] - up_span[0] : ranks.edges[e + 1] - up_span[0]]
            grads.append(mine.sum(0).to(branches.ups[e].dtype))
    return grads


def _rows_backward(
    dy: Tensor,
    x: Tensor,
    base: Tensor | QuantizedWeight,
    low: Tensor,
    gates: Tensor | None,
    branches: Branches,
    ranks: Ranks,
    needs: Sequence[bool],
    joint: tuple[int, int] | None,
) -> tuple[list[Tensor], Tensor | None]:
    """The wanted of dX, dG and dA, and the shares of dB of a span of ranks if one is given."""
    count = len(branches.downs)
    needs_x, needs_mixer = needs[:2]
    needs_downs = needs[2 : 2 + count]
    dropout, schedule = branches.threshold > 0, branches.schedule
    weight = (matrix if needs_x else outline)(base, x.dtype)
    if schedule is None or tiles.unserved(schedule, dy, ranks, dropout, backward=True):
        schedule = tiles.backward_schedule(dy, weight, ranks, dropout)
    joint = joint if ranks.padded <= tiles.WIDE_RANKS else None
    packed = _packed(x, [weight.shape[0]], [branches], ranks)
    down, up = packed.down[0], packed.ups[0]
    mixer = None if branches.mixer is None else branches.mixer.contiguous()
    weights, scaling = _weights(branches), branches.scaling
    words = None
    if branches.seed is not None:
        words = mask_words(branches.seed, branches.threshold, *x.shape)
    grads = []
    if needs_x and schedule == "overlapped":
        dx, dlow, dlogits, shares = overlapped_backward(
            dy, weight, down, up, mixer, low, gates, weights, ranks, scaling, joint
        )
        grads.append(dx)
    else:
        dlow, dlogits, shares = spread(dy, up, low, gates, weights, ranks, scaling, joint)
    if needs_x and schedule != "overlapped":
        dx = contract_with_strip(
            dy,
            weight,
            dlow,
            down,
            ranks,
            backward=True,
            dlogits=dlogits,
            mixer=mixer,
            words=words,
            base=dy @ weight if schedule == "expand" else None,  # [M, N] [N, K]
        )
        grads.append(dx)
    down_span = _span(ranks, needs_downs)
    if down_span or needs_mixer:
        span = down_span or (0, ranks.block)
        dlogits = dlogits if needs_mixer else None
        rows = reduce_down(x, dlow, dlogits, ranks, span, words)
        if branches.mixer is not None and needs_mixer:
            mine = rows[span[1] : span[1] + count]
            grads.append(mine.to(branches.mixer.dtype))
        for e, need in enumerate(needs_downs):
            if need:
                mine = rows[ranks.edges[e] - span[0] : ranks.edges[e + 1] - span[0]]
                grads.append(mine.to(branches.downs[e].dtype))
    return grads, shares


def _near(x: Tensor) -> Tensor:
    """x [M, K] with rows so near one another that cuBLAS, which counts in 32 bits, reaches all."""
    return x.contiguous() if x.stride(0) * x.element_size() >= 2**31 else x


def _span(ranks: Ranks, needs: Sequence[bool]) -> tuple[int, int] | None:
    """The first rank of the needed adapters, and how many ranks to make, padded; None for none."""
    needed = [e for e, need in enumerate(needs) if need]
    if not needed:
        return None
    first = ranks.edges[needed[0]]
    size = ranks.edges[needed[-1] + 1] - first
    width = max(16, next_power_of_2(size))
    return first, width if width <= ranks.block else cdiv(size, ranks.block) * ranks.block


def _ranks(branches: Branches, dtype: torch.dtype) -> Ranks:
    return side_by_side([a.shape[0] for a in branches.downs], dtype)


def _weights(branches: Branches) -> Sequence[float]:
    if branches.weights is None:
        return (1.0,) * len(branches.downs)
    return [float(weight) for weight in branches.weights]


def _sources(factors: Factors) -> list[Tensor]:
    """Factors as kernels read them: contiguous, and of one dtype."""
    mixed = len({factor.dtype for factor in factors}) > 1
    return [(factor.float() if mixed else factor).contiguous() for factor in factors]


def _packed(x: Tensor, outputs: Sequence[int], layers: Sequence[Branches], ranks: Ranks) -> Packed:
    k, count = x.shape[1], len(layers)
    down = x.new_empty(count, ranks.padded, k)
    router = None if layers[0].mixer is None else x.new_empty(count, 16, k)
    ups = [x.new_empty(n, ranks.padded) for n in outputs]
    for i, branches in enumerate(layers):
        pack(
            _sources(branches.downs),
            _sources(branches.ups),
            None if branches.mixer is None else branches.mixer.contiguous(),
            branches.scaling,
            ranks,
            down[i],
            None if router is None else router[i],
            ups[i],
        )
    return Packed(down, router, ups)


def _strips(x: Tensor, packed: Packed, layers: Sequence[Branches], ranks: Ranks) -> list[Strip]:
    first = layers[0]
    seeds = None
    if first.threshold:
        seeds = torch.stack([each.seed for each in layers if each.seed is not None])
    low, gated, gates = project(
        x,
        packed.down,
        packed.router,
        _weights(first),
        ranks,
        seeds,
        first.threshold,
    )
    kept = [None] * len(layers) if gates is None else gates
    return [Strip(*parts) for parts in zip(low, gated, kept, packed.ups, strict=True)]

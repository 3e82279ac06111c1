"""Forward plans of the Triton implementation: what each schedule allocates and launches."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapter import Branches
from .quantized import QuantizedWeight
from .triton import hopper, tiles
from .triton.contract import contracting
from .triton.decode import decoding
from .triton.forward import projecting, recomputing
from .triton.overlapped import overlapping
from .triton.pack import packing
from .triton.tiles import Ranks, side_by_side
from .weights import matrix, octets, outline


class Strip(NamedTuple):
    """What one pass over x has made for a layer; the packed adapters are flat."""

    low: Tensor  # P [M, R]
    gated: Tensor  # S [M, RANKS]
    gates: Tensor | None  # g [M, E]
    down: Tensor  # [RANKS, K]
    up: Tensor  # [N, RANKS]


class Forward(NamedTuple):
    """What a forward returns, and the packed adapters for a backward that follows, if there are."""

    y: Tensor  # [M, N]
    low: Tensor  # P [M, R], dtype of x
    gates: Tensor | None  # [M, E]
    down: Tensor | None = None  # [RANKS, K], flat; of Hopper's kernels `side` [HEAD + R, K]
    up: Tensor | None = None  # [N, RANKS], flat; of theirs [N, R]


def plan_forward(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: bool,
    branches: Branches,
    has_strip: bool,
) -> Callable[..., Forward]:
    ranks, weights = ranks_of(branches, x.dtype), fixed_weights(branches)
    gated, threshold, schedule = branches.mixer is not None, branches.threshold, branches.schedule
    like = outline(weight, x.dtype)
    if not has_strip and hopper.serves_forward(x, like, branches):
        return _plan_hopper(x, like, bias, branches, weights)
    if schedule is None or schedule == "hopper":
        schedule = tiles.forward_schedule(x, like, ranks, threshold > 0)
    elif reason := tiles.unserved(schedule, x, ranks, threshold > 0):
        raise RuntimeError(f"schedule {schedule!r} cannot serve this call: {reason}")
    if schedule == "decode" and not has_strip:
        return _plan_decode(x, weight, bias, branches, weights, ranks)
    pack = packing(x, [like.shape[0]], branches, ranks)
    if schedule == "recompute" and not has_strip:
        recompute = recomputing(x, like, bias, gated, weights, ranks)

        def run_recompute(
            x: Tensor, weight: Any, bias: Tensor | None, branches: Branches, strip: Any
        ) -> Forward:
            packed = pack(x, (branches,))
            made = recompute(x, matrix(weight, x.dtype), tidy(bias), packed)
            return Forward(*made, packed.downs[0], packed.ups[0])

        return run_recompute
    if schedule == "overlapped" and not has_strip:
        overlap = overlapping(x, like, bias, gated, weights, ranks, threshold)

        def run_overlapped(
            x: Tensor, weight: Any, bias: Tensor | None, branches: Branches, strip: Any
        ) -> Forward:
            packed = pack(x, (branches,))
            made = overlap(x, matrix(weight, x.dtype), tidy(bias), packed, branches.seed)
            return Forward(*made, packed.downs[0], packed.ups[0])

        return run_overlapped
    project = None if has_strip else plan_strips(x, [like.shape[0]], branches)
    expand = schedule == "expand"
    contract = contracting(x, like, ranks, bias=bias, base=not expand)

    def run(
        x: Tensor, weight: Any, bias: Tensor | None, branches: Branches, strip: Strip | None
    ) -> Forward:
        made: Any = project(x, (branches,))[0] if project else strip
        weight = matrix(weight, x.dtype)
        base = near(x) @ weight.t() if expand else None  # [M, K] [K, N]
        y = contract(x, weight, made.gated, made.up, bias=tidy(bias), base=base)
        return Forward(y, made.low, made.gates, made.down, made.up)

    return run


def _plan_hopper(
    x: Tensor, like: Tensor, bias: bool, branches: Branches, weights: Sequence[float]
) -> Callable[..., Forward]:
    mix = hopper.mixing(x, like, bias, branches, weights)

    def run(x: Tensor, weight: Any, bias: Tensor | None, branches: Branches, strip: Any) -> Forward:
        return Forward(*mix(x, matrix(weight, x.dtype), tidy(bias), branches))

    return run


def _plan_decode(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: bool,
    branches: Branches,
    weights: Sequence[float],
    ranks: Ranks,
) -> Callable[..., Forward]:
    packed = octets(weight) if isinstance(weight, QuantizedWeight) else None
    like = outline(weight, x.dtype) if packed is None else packed.data
    decode = decoding(x, like, bias, branches, weights, ranks, packed)
    as_stored = packed is not None

    def run(x: Tensor, weight: Any, bias: Tensor | None, branches: Branches, strip: Any) -> Forward:
        statistics = None
        if as_stored:
            stored: Any = octets(weight)
            weight, statistics = stored.data, stored.statistics
        else:
            weight = matrix(weight, x.dtype)
        return Forward(*decode(x, weight, tidy(bias), branches, statistics))

    return run


def plan_strips(
    x: Tensor, outputs: Sequence[int], first: Branches
) -> Callable[[Tensor, Sequence[Branches]], list[Strip]]:
    ranks, count = ranks_of(first, x.dtype), len(outputs)
    gated, threshold = first.mixer is not None, first.threshold
    pack = packing(x, outputs, first, ranks)
    project = projecting(x, count, gated, fixed_weights(first), ranks, threshold)

    def run(x: Tensor, layers: Sequence[Branches]) -> list[Strip]:
        packed, seeds = pack(x, layers), None
        if threshold:
            seeds = torch.stack([each.seed for each in layers if each.seed is not None])
        low, strip, gates = project(x, packed, seeds)
        kept = [None] * count if gates is None else gates.unbind()
        parts = zip(low.unbind(), strip.unbind(), kept, packed.downs, packed.ups, strict=True)
        return [Strip(*each) for each in parts]

    return run


def near(x: Tensor) -> Tensor:
    """x [M, K] with rows so near one another that cuBLAS, which counts in 32 bits, reaches all."""
    return x.contiguous() if x.stride(0) * x.element_size() >= 2**31 else x


def tidy(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def ranks_of(branches: Branches, dtype: torch.dtype) -> Ranks:
    return side_by_side([a.shape[0] for a in branches.downs], dtype)


def fixed_weights(branches: Branches) -> tuple[float, ...]:
    if branches.weights is None:
        return (1.0,) * len(branches.downs)
    return tuple([float(weight) for weight in branches.weights])

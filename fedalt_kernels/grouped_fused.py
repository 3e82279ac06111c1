"""The Triton implementation for many clients: cuBLAS's base product, and kernels for all beside it.

Symbols and equations as in `autograd.py`; R = Σ r_e, padded to RANKS.  The rows are sorted by
client, and a table on the device says whose each block of rows is, so one launch serves all
clients, its grid is the same for whatever share of the rows each has, and nothing waits for the
device.

Forward: `projecting_clients` makes P, S and the gates, `expanding_clients` adds S Bᵀ to the base
product; of up to 64 rows without dropout `decoding_clients` makes all beside the base, in any
order.  Backward: `spreading_clients` makes dP and dl, `expanding_clients` adds dP A and dl G to
dY W, `summing_clients` sums over each client's rows.

No GPU has run these kernels yet: they serve who asks for them.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .adapter import Branches
from .fused import base_kind, launched, rows_kind
from .fused_backward import gradient_dtype, span_of
from .fused_forward import fixed_weights, near, tidy
from .plans import Plans
from .quantized import QuantizedWeight
from .segments import Segments
from .triton.clients import stack, table
from .triton.grouped import expanding_clients, projecting_clients
from .triton.grouped_backward import masking_clients, spreading_clients, summing_clients
from .triton.grouped_decode import decoding_clients
from .triton.tiles import DECODE_ROWS, Ranks, Span, side_by_side, tile_through_pointers
from .weights import matrix

_forwards: Plans[Callable[..., Any]] = Plans()
_backwards: Plans[Callable[..., list[Tensor]]] = Plans()


def forward(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    branches: Branches,
    segments: Segments,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `grouped.forward`."""
    few = x.shape[0] <= DECODE_ROWS and not branches.threshold
    rows = x if few else segments.sort(x)
    make = _plan_decode if few else _plan_forward
    key = rows_kind(rows), base_kind(weight), _beside(branches), bias is None
    plan = _forwards.get(key) or _forwards.made(
        key, lambda: make(rows, weight.shape[0], bias is not None, branches)
    )
    y, low, gates = launched(rows, plan, rows, weight, bias, branches, segments)
    return y if few else segments.restore(y), low, gates


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    low: Tensor,
    gates: Tensor | None,
    branches: Branches,
    segments: Segments,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `grouped.backward`."""
    drows, rows = segments.sort(dy), segments.sort(x)
    key = rows_kind(drows), rows_kind(rows), base_kind(weight), _beside(branches), tuple(needs)
    plan = _backwards.get(key) or _backwards.made(
        key, lambda: _plan_backward(drows, rows, branches, needs)
    )
    grads = launched(rows, plan, drows, rows, weight, low, gates, branches, segments)
    return [segments.restore(grads[0]), *grads[1:]] if needs[0] else grads


def _plan_decode(
    x: Tensor, outputs: int, bias: bool, branches: Branches
) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    ranks, weights = _ranks(branches, x.dtype), fixed_weights(branches)
    decode = decoding_clients(x, outputs, bias, branches, weights, ranks)

    def run(
        x: Tensor, weight: Any, bias: Tensor | None, branches: Branches, segments: Segments
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y = near(x) @ matrix(weight, x.dtype).t()  # [M, K] [K, N]
        owners = segments.owners(x.device)
        return y, *decode(x, y, tidy(bias), branches, owners, segments.inverse)

    return run


def _plan_forward(
    x: Tensor, outputs: int, bias: bool, branches: Branches
) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    ranks, weights = _ranks(branches, x.dtype), fixed_weights(branches)
    count, threshold = branches.downs[0].shape[0], branches.threshold
    height = tile_through_pointers("project", x).m
    project = projecting_clients(x, count, branches.mixer is not None, weights, ranks, threshold)
    expand = expanding_clients(x, outputs, count, ranks, bias=bias)

    def run(
        x: Tensor, weight: Any, bias: Tensor | None, branches: Branches, segments: Segments
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        blocks, packed = table(segments.sizes, height, x.device), stack(branches, ranks, x.dtype)
        low, strip, gates = project(x, packed, _seeds(branches, x.device), blocks)
        y = near(x) @ matrix(weight, x.dtype).t()  # [M, K] [K, N]
        expand(y, strip, packed.up, tidy(bias), None, None, None, blocks)
        return y, low, gates

    return run


def _plan_backward(
    dy: Tensor, x: Tensor, branches: Branches, needs: Sequence[bool]
) -> Callable[..., list[Tensor]]:
    ranks, weights = _ranks(branches, x.dtype), fixed_weights(branches)
    k, n, adapters = x.shape[1], dy.shape[1], len(branches.downs)
    count, gated = branches.downs[0].shape[0], branches.mixer is not None
    dropout, height = branches.threshold > 0, tile_through_pointers("spread", dy).m
    needs_x, needs_mixer, *needs_factors = needs
    needs_downs, needs_ups = needs_factors[:adapters], needs_factors[adapters:]
    ups, downs = span_of(ranks, needs_ups), span_of(ranks, needs_downs)
    if downs is None and needs_mixer:
        downs = Span(0, ranks.block, 0)
    dtype = gradient_dtype(branches, needs)
    spread = spreading_clients(dy, count, gated, weights, ranks)
    expand = expanding_clients(x, k, count, ranks, backward=True, gated=gated, dropout=dropout)
    mask = masking_clients(x, count, height, branches.threshold) if dropout else None
    sum_downs = sum_ups = None
    if downs is not None:
        sum_downs = summing_clients(
            x,
            count,
            ranks.padded,
            needs_mixer,
            (1.0,) * adapters,
            ranks,
            1.0,
            downs,
            dtype,
            makes_up=False,
            dropout=dropout,
        )
    if ups is not None:
        sum_ups = summing_clients(
            dy,
            count,
            ranks.edges[-1],
            gated,
            weights,
            ranks,
            branches.scaling,
            ups,
            dtype,
            makes_up=True,
        )
    spans = list(zip(ranks.edges, ranks.edges[1:], strict=False))

    def run(
        dy: Tensor,
        x: Tensor,
        weight: Any,
        low: Tensor,
        gates: Tensor | None,
        branches: Branches,
        segments: Segments,
    ) -> list[Tensor]:
        blocks, mixer, grads = table(segments.sizes, height, x.device), branches.mixer, []
        dlow = dlogits = words = None
        if needs_x or sum_downs:
            packed, seeds = stack(branches, ranks, x.dtype), _seeds(branches, x.device)
            dlow, dlogits = spread(dy, packed, low, gates, blocks)
            words = None if mask is None or seeds is None else mask(seeds, blocks)
            if needs_x:
                dx = dy @ matrix(weight, x.dtype)  # [M, N] [N, K]
                expand(dx, dlow, packed.down, None, dlogits, tidy(mixer), words, blocks)
                grads.append(dx)
        if sum_downs and downs is not None:
            made = sum_downs(x, dlow, dlogits if needs_mixer else None, words, blocks)
            if needs_mixer and mixer is not None:
                grads.append(made[:, downs.width : downs.width + adapters].to(mixer.dtype))
            for (first, last), a, need in zip(spans, branches.downs, needs_downs, strict=True):
                if need:
                    grads.append(made[:, first - downs.first : last - downs.first].to(a.dtype))
        if sum_ups and ups is not None:
            made = sum_ups(dy, low, gates, None, blocks)
            for (first, last), b, need in zip(spans, branches.ups, needs_ups, strict=True):
                if need:
                    mine = made[:, n * (first - ups.first) : n * (last - ups.first)]
                    grads.append(mine.view(count, n, -1).to(b.dtype))
        return grads

    return run


def _seeds(branches: Branches, device: torch.device) -> Tensor | None:
    return None if branches.seed is None else branches.seed.to(device, non_blocking=True)


def _ranks(branches: Branches, dtype: torch.dtype) -> Ranks:
    return side_by_side([a.shape[1] for a in branches.downs], dtype)


def _beside(branches: Branches) -> Hashable:
    """What plans depend on of all beside the base but the addresses."""
    downs, ups, mixer, weights, scaling, threshold, *_ = branches
    return (
        *[(a.shape, a.dtype, b.dtype) for a, b in zip(downs, ups, strict=True)],
        None if mixer is None else mixer.dtype,
        None if weights is None else tuple(weights),
        scaling,
        threshold,
    )

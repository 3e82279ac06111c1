"""The Triton implementation for many clients: cuBLAS's base product, and kernels for all beside it.

Symbols and equations as in `autograd.py`; R = Σ r_e, padded to RANKS.  The rows are sorted by
client, and a table on the device says whose each block of rows is, so one launch serves all
clients, its grid is the same for whatever share of the rows each has, and nothing waits for the
device.  Forward: `projecting_clients` makes P, S and the gates, `expanding_clients` adds S Bᵀ to
the base product.  Of up to 64 rows without dropout `decoding_clients` makes all beside the base, in
any order.  No GPU has run these kernels yet: they serve who asks for them.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .adapter import Branches
from .fused import base_kind, launched, rows_kind
from .fused_forward import fixed_weights, near, tidy
from .grouped import backward as backward
from .plans import Plans
from .quantized import QuantizedWeight
from .segments import Segments
from .triton.clients import stack, table
from .triton.grouped import expanding_clients, projecting_clients
from .triton.grouped_decode import decoding_clients
from .triton.tiles import DECODE_ROWS, Ranks, side_by_side, tile_through_pointers
from .weights import matrix

_forwards: Plans[Callable[..., Any]] = Plans()


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

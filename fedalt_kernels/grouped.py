"""Many clients' rows by PyTorch: one base product for all, narrow products for each.

Symbols as in `autograd.py`, whose equations hold for each client's rows.  With the rows sorted by
client, m_c of them client c's::

    y = x Wᵀ        [M, N], all rows at once        dX = dY W        [M, K], likewise

and each client's adapters are added to its segments of both in place, with nothing padded.

`Branches` are stacked here: downs [C, r_e, K], ups [C, N, r_e], mixer [C, E, K], seed int64 [C].
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import merged
from .adapter import Branches
from .quantized import QuantizedWeight, dense
from .segments import Segments


def forward(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    branches: Branches,
    segments: Segments,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns y [M, N]; of the sorted rows P [M, R], and the gates [M, E] (None without a mixer).

    Args:
        x: [M, K].
        weight: [N, K], dtype of x or quantized.
        bias: [N] or None, dtype of x.
        branches: stacked.
        segments: of the M rows.
    """
    rows, clients = segments.sort(x), _clients(branches)
    y = linear(rows, dense(weight, x.dtype))  # [M, K] [K, N]
    low, gates = beside(x, branches)
    for client, part in segments.slices():
        mine, own = merged.add_adapters(y[part], rows[part], bias, clients[client])
        low[part].copy_(mine)
        if gates is not None and own is not None:
            gates[part].copy_(own)
    return segments.restore(y), low, gates


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
    """Returns the gradients that `needs` asks for, in its order: x, mixer, every A_e, every B_e.

    Args:
        dy: [M, N], dtype of x.
        x, weight, branches, segments: as they were given to `forward`.
        low, gates: as `forward` returned them.
        needs: 2 + 2 E flags.
    """
    rows, drows, clients = segments.sort(x), segments.sort(dy), _clients(branches)
    dx = drows @ dense(weight, x.dtype) if needs[0] else None  # [M, N] [N, K]
    parameters = (branches.mixer, *branches.downs, *branches.ups)
    wanted = [p for p, need in zip(parameters, needs[1:], strict=True) if need and p is not None]
    stacked = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in wanted]
    for client, part in segments.slices():
        own = None if gates is None else gates[part]
        inputs = drows[part], rows[part], low[part], own, clients[client], needs
        dpart = None if dx is None else dx[part]
        found = merged.add_gradients(dpart, *inputs)[0 if dx is None else 1 :]
        for target, grad in zip(stacked, found, strict=True):
            target[client].copy_(grad)
    return stacked if dx is None else [segments.restore(dx), *stacked]


def beside(x: Tensor, branches: Branches) -> tuple[Tensor, Tensor | None]:
    """Room for P [M, R] and the gates [M, E]."""
    low = x.new_empty(x.shape[0], sum(a.shape[1] for a in branches.downs))
    if branches.mixer is None:
        return low, None
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return low, x.new_empty(x.shape[0], len(branches.downs), dtype=wide)


def _clients(branches: Branches) -> list[Branches]:
    """Every client's own, its seed on the host, where the masks are made."""
    downs, ups, mixer, weights, scaling, threshold, seed, *_ = branches
    count = downs[0].shape[0]
    mixers = [None] * count if mixer is None else mixer.unbind()
    seeds = [None] * count if seed is None else seed.cpu().unbind()
    firsts = zip(*(a.unbind() for a in downs), strict=True)
    seconds = zip(*(b.unbind() for b in ups), strict=True)
    return [
        Branches(a, b, own, weights, scaling, threshold, drawn)
        for a, b, own, drawn in zip(firsts, seconds, mixers, seeds, strict=True)
    ]

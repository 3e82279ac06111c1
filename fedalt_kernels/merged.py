"""The PyTorch implementation: forward and backward on merged matrix products, on any device.

The symbols are those of `reference.py`, the equations those of `autograd.py`.  R = Σ r_e, and the
adapters stand side by side: ``down`` [R, K] is every A_e, ``up`` [N, R] every B_e.  Each narrow
product reads x or dY once for all adapters, gates are applied in rank space, and y and dX receive
the adapters as one strip of contraction, accumulated into the base product's own output.

Dropout is a 0/1 mask here; its 1 / (1 - t / 256) is part of ``scaling``.  It is applied to blocks
of rows small enough to stay in cache, so no [M, K] mask or dropped copy of x ever exists.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from .adapter import Branches, Factors
from .dropout import keep_rows
from .quantized import QuantizedWeight, dense

# 2 MiB of float32: larger blocks leave the cache, smaller ones cost calls.
BLOCK_ELEMENTS = 2**19


def forward(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, branches: Branches
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns y [M, N], P [M, R] in x's dtype, and the gates [M, E] (None without a mixer).

    Args:
        x: [M, K].
        weight: [N, K], dtype of x or quantized.
        bias: [N] or None, dtype of x.
        branches: the adapters and how to mix them.
    """
    y = linear(x, dense(weight, x.dtype))  # [M, K] [K, N]
    return y, *add_adapters(y, x, bias, branches)


def add_adapters(
    y: Tensor, x: Tensor, bias: Tensor | None, branches: Branches
) -> tuple[Tensor, Tensor | None]:
    """Adds the bias and the adapters to the base product y [M, N]; returns P and the gates."""
    down = _joined(branches.downs, 0, x.dtype)
    if branches.threshold:
        masked = (_mask(block, first, branches).mul_(block) for first, (block,) in _blocks(x))
        low = _joined([linear(block, down) for block in masked], 0, x.dtype)  # [m, K] [K, R]
    else:
        low = linear(x, down)  # [M, K] [K, R]
    gates = None if branches.mixer is None else _gates(x, branches.mixer)
    if gates is None:
        strip = low * branches.scaling
    else:
        strip = _cast(_times_gates(low, gates * branches.scaling, branches), x.dtype)
    up = _up(branches, x.dtype)
    if bias is not None:
        # As one more column it costs nothing; addmm would first copy it to every row of y.
        strip = torch.cat((strip, strip.new_ones(strip.shape[0], 1)), 1)
        up = torch.cat((up, bias.unsqueeze(1)), 1)
    y.addmm_(strip, up.t())  # [M, R + 1] [R + 1, N]
    return low, gates


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

    Args:
        dy: [M, N], dtype of x.
        x, weight, branches: as they were given to `forward`.
        low, gates: as `forward` returned them.
        needs: 2 + 2 E flags.
    """
    dx = dy @ dense(weight, x.dtype) if needs[0] else None  # [M, N] [N, K]
    return add_gradients(dx, dy, x, low, gates, branches, needs)


def add_gradients(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor,
    low: Tensor,
    gates: Tensor | None,
    branches: Branches,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `backward`, given the base's part of dX [M, K], which it adds to; None: not wanted."""
    split = 2 + len(branches.downs)
    needs_rows, needs_ups = needs[1:split], needs[split:]
    grads: list[Tensor] = []
    dups = _up_gradients(dy, low, gates, branches, needs_ups) if any(needs_ups) else []
    if dx is not None or any(needs_rows):
        dlow = dy @ _up(branches, x.dtype)  # T: [M, N] [N, R]
        dlogits = None
        if gates is not None:
            t = _cast(dlow, gates.dtype)
            dlow = _cast(_times_gates(t, gates, branches), x.dtype)
            dgates = _sums(t * low, branches)
            dlogits = torch._softmax_backward_data(dgates, gates, -1, gates.dtype)
            dlogits = _cast(dlogits, x.dtype)
        add = _add_dropped if branches.threshold else _add_plain
        rows = add(dx, x, dlow, dlogits, branches, needs_rows)
        grads = rows if dx is None else [dx, *rows]
    return grads + dups


def _add_plain(
    dx: Tensor | None,
    x: Tensor,
    dlow: Tensor,
    dlogits: Tensor | None,
    branches: Branches,
    needs_rows: Sequence[bool],
) -> list[Tensor]:
    """Adds the strip to dX; returns the wanted of dG and dA_e, from one product."""
    rows: list[Tensor] = [*branches.downs]
    strip = dlow
    if dlogits is not None and branches.mixer is not None:
        rows = [branches.mixer, *rows]
        strip = torch.cat((dlogits, dlow), 1)  # [M, E + R]
    else:
        needs_rows = needs_rows[1:]
    if dx is not None:
        dx.addmm_(strip, _joined(rows, 0, x.dtype), alpha=branches.scaling)  # [M, E + R] [E + R, K]
    if not any(needs_rows):
        return []
    sizes = [row.shape[0] for row in rows]
    wanted = _columns(strip, sizes, needs_rows).t() @ x  # [wanted, M] [M, K]
    return _pieces(wanted, sizes, rows, needs_rows, branches.scaling)


def _add_dropped(
    dx: Tensor | None,
    x: Tensor,
    dlow: Tensor,
    dlogits: Tensor | None,
    branches: Branches,
    needs_rows: Sequence[bool],
) -> list[Tensor]:
    """`_add_plain` with the mask between x and the adapters, made again block by block."""
    grads: list[Tensor] = []
    needs_mixer, needs_downs = needs_rows[0], needs_rows[1:]
    mixer = branches.mixer
    if dlogits is not None and mixer is not None and needs_mixer:
        wanted = dlogits.t() @ x  # [E, M] [M, K]
        grads += _pieces(wanted, [mixer.shape[0]], [mixer], [True], branches.scaling)
    down = _joined(branches.downs, 0, x.dtype)
    picked = _columns(dlow, _ranks(branches), needs_downs) if any(needs_downs) else None
    total = None
    for first, (block, dblock, dlows, dgates, picks) in _blocks(x, dx, dlow, dlogits, picked):
        keep = _mask(block, first, branches)
        if dblock is not None:
            if dgates is not None and mixer is not None:
                _add_gate_gradient(dblock, dgates, mixer, branches.scaling)
            dblock.addcmul_(dlows @ down, keep, value=branches.scaling)  # [m, R] [R, K]
        if picks is not None:
            part = picks.t() @ keep.mul_(block)  # [wanted, m] [m, K]
            total = _cast(part, _wide(x.dtype)) if total is None else total.add_(part)
    if total is not None:
        downs = branches.downs
        grads += _pieces(total, _ranks(branches), downs, needs_downs, branches.scaling)
    return grads


def _add_gate_gradient(dx: Tensor, dlogits: Tensor, mixer: Tensor, scaling: float) -> None:
    """dX += s dl G."""
    if mixer.shape[0] == 2:
        # dl_1 = -dl_0, and a product of rank one is faster by elements than by matrices.
        difference = _cast(mixer[:1] - mixer[1:], dx.dtype)
        dx.addcmul_(dlogits[:, :1], difference, value=scaling)
    else:
        dx.addmm_(dlogits, _cast(mixer, dx.dtype), alpha=scaling)  # [M, E] [E, K]


def _up_gradients(
    dy: Tensor, low: Tensor, gates: Tensor | None, branches: Branches, needs_ups: Sequence[bool]
) -> list[Tensor]:
    """dB_e of the wanted adapters, from one product of their gated P with dY."""
    parts = []
    ranks = _ranks(branches)
    for e, rank in enumerate(ranks):
        if needs_ups[e]:
            start = sum(ranks[:e])
            part = low[:, start : start + rank]
            if gates is not None:
                part = _cast(part * gates[:, e : e + 1], low.dtype)
            elif branches.weights is not None:
                part = part * branches.weights[e]
            parts.append(part)
    gated = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    wanted = gated.t() @ dy  # [wanted, M] [M, N]; the other orientation is ten times slower
    pieces = _pieces(wanted, ranks, branches.ups, needs_ups, branches.scaling)
    return [piece.t() for piece in pieces]


def _pieces(
    wanted: Tensor,
    sizes: Sequence[int],
    like: Sequence[Tensor],
    needs: Sequence[bool],
    scaling: float,
) -> list[Tensor]:
    """Scales merged rows and cuts them into those of the needed ones, in the dtypes of `like`."""
    scaled = _cast(wanted, _wide(wanted.dtype)).mul_(scaling)
    rows = [size for size, need in zip(sizes, needs, strict=True) if need]
    dtypes = [owner.dtype for owner, need in zip(like, needs, strict=True) if need]
    parts = scaled.split_with_sizes(rows) if len(rows) > 1 else (scaled,)
    return [_cast(part, dtype) for part, dtype in zip(parts, dtypes, strict=True)]


def _columns(merged: Tensor, sizes: Sequence[int], needs: Sequence[bool]) -> Tensor:
    """The columns of the needed members; a view where they lie side by side."""
    first = next(i for i, need in enumerate(needs) if need)
    count = sum(needs)
    if all(needs[first : first + count]):
        start = sum(sizes[:first])
        return merged[:, start : start + sum(sizes[first : first + count])]
    parts = merged.split(list(sizes), 1)
    return torch.cat([part for part, need in zip(parts, needs, strict=True) if need], 1)


def _joined(parts: Factors, dim: int, dtype: torch.dtype) -> Tensor:
    return _cast(parts[0] if len(parts) == 1 else torch.cat(parts, dim), dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)` without its microsecond where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _up(branches: Branches, dtype: torch.dtype) -> Tensor:
    """Every B_e side by side, [N, R], times its fixed weight where there is one."""
    ups = branches.ups
    if branches.weights is not None:
        ups = [b * w for b, w in zip(ups, branches.weights, strict=True)]
    return _joined(ups, 1, dtype)


def _ranks(branches: Branches) -> list[int]:
    return [a.shape[0] for a in branches.downs]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gates(x: Tensor, mixer: Tensor) -> Tensor:
    """softmax(x Gᵀ), [M, E] in at least float32."""
    wide = _wide(x.dtype)
    if mixer.shape[0] == 2:
        # Of two logits only the difference counts; taking it first halves the rounding, and a
        # sigmoid is several times faster than a softmax over two columns.
        differences = _cast(mixer - mixer.flip(0), x.dtype)
        return torch.sigmoid(_cast(linear(x, differences), wide))
    return torch.softmax(linear(x, _cast(mixer, x.dtype)), -1, dtype=wide)


def _times_gates(low: Tensor, gates: Tensor, branches: Branches) -> Tensor:
    """Column block e of `low` [M, R] times gate e, in the gates' dtype."""
    ranks = _ranks(branches)
    if len(set(ranks)) == 1:
        cube = low.view(low.shape[0], len(ranks), ranks[0])
        return (cube * gates.unsqueeze(-1)).view(low.shape)
    parts = zip(low.split(ranks, 1), gates.split(1, 1), strict=True)
    return torch.cat([part * gate for part, gate in parts], 1)


def _sums(products: Tensor, branches: Branches) -> Tensor:
    """The row-wise sum over each adapter's columns: [M, R] to [M, E]."""
    ranks = _ranks(branches)
    if len(set(ranks)) == 1:
        return products.view(products.shape[0], len(ranks), ranks[0]).sum(-1)
    return torch.stack([part.sum(1) for part in products.split(ranks, 1)], 1)


def _blocks(x: Tensor, *others: Tensor | None) -> Iterator[tuple[int, list[Any]]]:
    """Blocks of rows that stay in cache: the first row's number, and those rows of each matrix."""
    rows, columns = x.shape
    height = max(1, BLOCK_ELEMENTS // columns)
    if rows <= height:
        yield 0, [x, *others]
        return
    for first in range(0, rows, height):
        block = slice(first, first + height)
        yield first, [matrix if matrix is None else matrix[block] for matrix in (x, *others)]


def _mask(x: Tensor, first: int, branches: Branches) -> Tensor:
    """The 0/1 mask of a block of rows, in x's dtype; the caller's own."""
    seed, threshold = int(cast("Tensor", branches.seed)), branches.threshold
    return keep_rows(seed, threshold, first, *x.shape).to(x.device, x.dtype)

"""S from x: in a launch of its own, or inside the base product's.

`_project` is the first launch of *split at the rank* and of *cuBLAS plus expand*, whose last is
`contract`.  *Recompute* makes S anew for every column of tiles in the loop of the base product.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .pack import Packed
from .primitives import (
    GATES,
    LOGITS,
    add_bias,
    dot,
    load_block,
    load_factor,
    rounded,
    softmax_gates,
    spread_gates,
    store_block,
    tile_at,
)
from .strips import project_rows
from .tiles import GROUP_M, Ranks, boxed, flat, precision, stored, tile_for


@triton.jit(do_not_specialize=["M", "layers"])
def _project(
    x,
    down,
    router,
    weights,
    seeds,
    low,
    gated,
    gates,
    threshold,
    layers,
    M,
    stride_x,
    K: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`project_rows` for every block of rows, and for every layer that reads this x."""
    # Layers take turns, so that those after the first find x in the L2 cache.
    member = (tl.program_id(0) % layers).to(tl.int64)
    project_rows(
        tl.program_id(0) // layers,
        x,
        down,
        router,
        weights,
        tl.load(seeds + member) if DROPOUT else 0,
        threshold,
        low + member * M * EDGES[E],
        gated + member * M * RANKS,
        gates + member * M * E if GATED else gates,
        M,
        stride_x,
        (member * RANKS).to(tl.int32),
        (member * LOGITS).to(tl.int32),
        K,
        E,
        EDGES,
        RANKS,
        BLOCK_M,
        BLOCK_K,
        BLOCK_R,
        STAGES,
        GATED,
        DROPOUT,
        EVEN_M,
        TMA,
        PRECISION,
    )


def projecting(
    x: Tensor,
    layers: int,
    gated: bool,
    weights: Sequence[float],
    ranks: Ranks,
    threshold: int,
) -> Callable[[Tensor, Packed, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]:
    """Plans P, S and the gates of L layers that read the same x [M, K], in one pass over it.

    Args:
        x: or one like it.
        layers: L.
        gated: whether there are mixers; else `weights`, E fixed gates, gate.
        threshold: bytes of the mask below it are dropped.

    Returns:
        Of x, the packed layers and, under dropout, their seeds, int64 [L]: P [L, M, R] and
        S [L, M, RANKS] in x's dtype, gates [L, M, E] in float32 or None.
    """
    (m, k), e = x.shape, len(ranks.edges) - 1
    tile, tma = tile_for(
        "project", ranks, x, flat(layers * ranks.padded, k, x), dropout=threshold > 0
    )
    narrow = {"down": layers * ranks.padded, "router": layers * LOGITS.value if gated else 0}
    boxes = {
        "x": boxed(m, k, x.stride(0), (tile.m, tile.k), tma),
        "down": boxed(narrow["down"], k, k, (ranks.block, tile.k), tma),
        "router": boxed(narrow["router"], k, k, (LOGITS.value, tile.k), tma),
    }
    launch = Launch(
        _project,
        (layers * triton.cdiv(m, tile.m) * (ranks.padded // ranks.block),),
        ("x", "down", "router", "seeds", "low", "gated", "gates"),
        boxes,
        tile.warps,
        weights=tuple(weights),
        threshold=threshold,
        layers=layers,
        M=m,
        stride_x=x.stride(0),
        K=k,
        E=e,
        EDGES=ranks.edges,
        RANKS=ranks.padded,
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        BLOCK_R=ranks.block,
        STAGES=tile.stages,
        GATED=gated,
        DROPOUT=threshold > 0,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(x.dtype),
    )

    def run(
        x: Tensor, packed: Packed, seeds: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        low = x.new_empty(layers, m, ranks.edges[-1])
        strip = x.new_empty(layers, m, ranks.padded)
        gates = x.new_empty(layers, m, e, dtype=torch.float32) if gated else None
        launch(x, packed.downs[0], packed.routers[0], seeds, low, strip, gates)
        return low, strip, gates

    return run


@triton.jit(do_not_specialize=["M"])
def _recompute(
    x,
    weight,
    down,
    router,
    up,
    bias,
    weights,
    y,
    low,
    gates,
    M,
    stride_x,
    stride_weight,
    K: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    OUT_MAJOR: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The loop of `contract` with the narrow products inside; programs of column 0 keep P and g."""
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row, at = tile_m * BLOCK_M, tile_n * BLOCK_N
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_low = tl.zeros((BLOCK_M, RANKS), tl.float32)
    parts = tl.zeros((BLOCK_M, LOGITS), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        b_x = load_block(x, row, k, M, K, stride_x, BLOCK_M, BLOCK_K, EVEN_M and EVEN_K, TMA)
        b_weight = load_factor(weight, k, at, K, N, stride_weight, BLOCK_K, BLOCK_N, OUT_MAJOR, TMA)
        acc = dot(b_x, b_weight, acc, PRECISION)  # [m, k] [k, n]
        b_down = load_block(down, 0, k, RANKS, K, K, RANKS, BLOCK_K, EVEN_K, TMA)
        b_low = dot(b_x, b_down.T, b_low, PRECISION)  # [m, k] [k, r]
        if GATED:
            b_router = load_block(router, 0, k, LOGITS, K, K, LOGITS, BLOCK_K, EVEN_K, TMA)
            parts = dot(b_x, b_router.T, parts, PRECISION)  # [m, k] [k, 16]
    b_gates = softmax_gates(parts, E)
    wide = spread_gates(b_gates, weights, tl.arange(0, RANKS), E, EDGES, GATED)
    b_up = load_block(up, at, 0, N, RANKS, RANKS, BLOCK_N, RANKS, N % BLOCK_N == 0, False)
    b_gated = rounded(b_low * wide, b_up.dtype, PRECISION)
    acc = dot(b_gated, b_up.T, acc, PRECISION)  # [m, r] [r, n]
    if BIAS:
        acc = add_bias(acc, bias, at, N, BLOCK_N)
    store_block(y, acc, row, at, M, N, N, BLOCK_M, BLOCK_N, TMA, PRECISION)
    if at == 0:
        store_block(low, b_low, row, 0, M, EDGES[E], EDGES[E], BLOCK_M, RANKS, False, PRECISION)
        if GATED:
            store_block(gates, b_gates, row, 0, M, E, E, BLOCK_M, GATES, False, PRECISION)


def recomputing(
    x: Tensor, weight: Tensor, bias: bool, gated: bool, weights: Sequence[float], ranks: Ranks
) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """Plans y [M, N], P [M, R] and the gates [M, E] or None, of x, W, the bias and the packed.

    Arguments are those of such a call, or like them.
    """
    (m, k), n, e = x.shape, weight.shape[0], len(ranks.edges) - 1
    rows = stored(weight)
    out_major = rows is weight
    like = flat(m, n, x), flat(ranks.padded, k, x)
    tile, tma = tile_for("recompute", ranks, x, rows, *like)
    wide = (tile.n, tile.k) if out_major else (tile.k, tile.n)
    boxes = {
        "x": boxed(m, k, x.stride(0), (tile.m, tile.k), tma),
        "weight": boxed(rows.shape[0], rows.shape[1], rows.stride(0), wide, tma),
        "down": boxed(ranks.padded, k, k, (ranks.padded, tile.k), tma),
        "router": boxed(LOGITS.value, k, k, (LOGITS.value, tile.k), tma),
        "y": boxed(m, n, n, (tile.m, tile.n), tma),
    }
    launch = Launch(
        _recompute,
        (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),),
        ("x", "weight", "down", "router", "up", "bias", "y", "low", "gates"),
        boxes,
        tile.warps,
        weights=tuple(weights),
        M=m,
        stride_x=x.stride(0),
        stride_weight=rows.stride(0),
        K=k,
        N=n,
        E=e,
        EDGES=ranks.edges,
        RANKS=ranks.padded,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=GROUP_M,
        STAGES=tile.stages,
        BIAS=bias,
        GATED=gated,
        OUT_MAJOR=out_major,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(x.dtype),
    )

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y, low = x.new_empty(m, n), x.new_empty(m, ranks.edges[-1])
        gates = x.new_empty(m, e, dtype=torch.float32) if gated else None
        launch(x, weight, *packed.of(0), bias, y, low, gates)
        return y, low, gates

    return run

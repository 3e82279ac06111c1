"""S from x: in a launch of its own, or inside the base product's.

`project` is the first launch of *split at the rank* and of *cuBLAS plus expand*, whose last is
`contract`.  *Recompute* makes S anew for every column of tiles in the loop of the base product.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from .tiles import GROUP_M, Ranks, described, precision, stored, tile_for


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


def project(
    x: Tensor,
    down: Tensor,
    router: Tensor | None,
    weights: Sequence[float],
    ranks: Ranks,
    seeds: Tensor | None,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """P, S and the gates of L layers that read the same x, in one pass over it.

    Args:
        x: [M, K].
        down: [L, RANKS, K], the packed down-projections, in x's dtype.
        router: [L, 16, K], the packed mixers, or None: `weights` gate.
        weights: E fixed gates.
        seeds: int64 [L], or None without dropout.
        threshold: bytes of the mask below it are dropped.

    Returns:
        P [L, M, R] and S [L, M, RANKS] in x's dtype, gates [L, M, E] in float32 or None.
    """
    m, k = x.shape
    layers, e = down.shape[0], len(ranks.edges) - 1
    low = x.new_empty(layers, m, ranks.edges[-1])
    gated = x.new_empty(layers, m, ranks.padded)
    gates = None if router is None else x.new_empty(layers, m, e, dtype=torch.float32)
    flat = down.view(-1, k)
    rows = None if router is None else router.view(-1, k)
    tile, tma = tile_for("project", ranks, x, flat, dropout=threshold > 0)
    grid = (layers * triton.cdiv(m, tile.m) * (ranks.padded // ranks.block),)
    _project[grid](
        x=described(x, tile.m, tile.k, tma),
        down=described(flat, ranks.block, tile.k, tma),
        router=None if rows is None else described(rows, LOGITS.value, tile.k, tma),
        weights=tuple(weights),
        seeds=seeds,
        low=low,
        gated=gated,
        gates=gates,
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
        GATED=router is not None,
        DROPOUT=threshold > 0,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(x.dtype),
        num_warps=tile.warps,
    )
    return low, gated, gates


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


def recompute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    router: Tensor | None,
    up: Tensor,
    weights: Sequence[float],
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `overlapped`, without dropout and for ranks that fit into one block."""
    m, k = x.shape
    n, e = weight.shape[0], len(ranks.edges) - 1
    y, low = x.new_empty(m, n), x.new_empty(m, ranks.edges[-1])
    gates = None if router is None else x.new_empty(m, e, dtype=torch.float32)
    rows = stored(weight)
    out_major = rows is weight
    tile, tma = tile_for("recompute", ranks, x, rows, y, down)
    _recompute[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
        x=described(x, tile.m, tile.k, tma),
        weight=described(rows, *((tile.n, tile.k) if out_major else (tile.k, tile.n)), tma),
        down=described(down, ranks.padded, tile.k, tma),
        router=None if router is None else described(router, LOGITS.value, tile.k, tma),
        up=up,
        bias=bias,
        weights=tuple(weights),
        y=described(y, tile.m, tile.n, tma),
        low=low,
        gates=gates,
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
        BIAS=bias is not None,
        GATED=router is not None,
        OUT_MAJOR=out_major,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(x.dtype),
        num_warps=tile.warps,
    )
    return y, low, gates

"""The two narrow products over all columns of x and of dY, for one block of rows.

They are kernels of their own (`forward.project`, `backward.spread`), and the first work items of
the overlapped kernels.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    GATES,
    LOGITS,
    dot,
    keep_block,
    load_block,
    owned,
    rounded,
    softmax_gates,
    spread_gates,
    store_block,
)
from .tiles import Ranks, Span


@triton.jit
def project_rows(
    item,
    x,
    down,
    router,
    weights,
    seed,
    threshold,
    low,
    gated,
    gates,
    M,
    stride_x,
    down_row,
    router_row,
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
    """P = x~ downᵀ, g = softmax(x Gᵀ) and S = g P, for one block of rows and one of ranks.

    The down-projections begin at row `down_row` of `down`, the mixer's parts at `router_row` of
    `router`.  Writes low = P [M, EDGES[E]], gated = S [M, RANKS], gates = g [M, E].
    """
    RANK_BLOCKS: tl.constexpr = RANKS // BLOCK_R
    row = item // RANK_BLOCKS * BLOCK_M
    rank = item % RANK_BLOCKS * BLOCK_R
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    b_low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    parts = tl.zeros((BLOCK_M, LOGITS), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        b_x = load_block(x, row, k, M, K, stride_x, BLOCK_M, BLOCK_K, EVEN_M and EVEN_K, TMA)
        b_down = load_block(
            down, down_row + rank, k, down_row + RANKS, K, K, BLOCK_R, BLOCK_K, EVEN_K, TMA
        )
        if GATED:
            b_router = load_block(
                router, router_row, k, router_row + LOGITS, K, K, LOGITS, BLOCK_K, EVEN_K, TMA
            )
            parts = dot(b_x, b_router.T, parts, PRECISION)  # [m, k] [k, 16]
        if DROPOUT:
            keep = keep_block(seed, threshold, row, k, K, BLOCK_M, BLOCK_K)
            b_x = tl.where(keep, b_x, 0.0).to(b_x.dtype)
        b_low = dot(b_x, b_down.T, b_low, PRECISION)  # [m, k] [k, r]
    o_rank = rank + tl.arange(0, BLOCK_R)
    b_gates = softmax_gates(parts, E)
    wide = spread_gates(b_gates, weights, o_rank, E, EDGES, GATED)
    store_block(
        gated,
        b_low * wide,
        row,
        rank,
        M,
        RANKS,
        RANKS,
        BLOCK_M,
        BLOCK_R,
        False,
        PRECISION,
    )
    store_block(low, b_low, row, rank, M, EDGES[E], EDGES[E], BLOCK_M, BLOCK_R, False, PRECISION)
    if GATED:
        if rank == 0:
            store_block(gates, b_gates, row, 0, M, E, E, BLOCK_M, GATES, False, PRECISION)


@triton.jit
def spread_rows(
    item,
    dy,
    up,
    low,
    gates,
    weights,
    scaling,
    dlow,
    dlogits,
    dup,
    M,
    stride_dy,
    N: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FIRST: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    JOINT: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T = dY up, dP = g T and dl = g (dg - <g, dg>), for one block of rows; s is part of up.

    Writes dlow = dP [M, RANKS] and dlogits = dl [M, 8].  JOINT: the same read of dY makes this
    block's share of dB of the ranks from FIRST on: dup [row blocks, N, SPAN] in float32.
    """
    row = item * BLOCK_M
    EVEN: tl.constexpr = N % BLOCK_N == 0
    if GATED:
        b_gates = load_block(gates, row, 0, M, E, E, BLOCK_M, GATES, False, False)
    else:
        b_gates = tl.zeros((BLOCK_M, GATES), tl.float32)
    dgates = tl.zeros((BLOCK_M, GATES), tl.float32)
    if JOINT:
        b_share = load_gated(low, b_gates, weights, row, FIRST, M, E, EDGES, BLOCK_M, SPAN, GATED)
    for rank in tl.range(0, RANKS, BLOCK_R, num_stages=1):
        o_rank = rank + tl.arange(0, BLOCK_R)
        spread = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for n in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            b_dy = load_block(dy, row, n, M, N, stride_dy, BLOCK_M, BLOCK_N, EVEN_M and EVEN, TMA)
            b_up = load_block(up, n, rank, N, RANKS, RANKS, BLOCK_N, BLOCK_R, EVEN, False)
            spread = dot(b_dy, b_up, spread, PRECISION)  # [m, n] [n, r]
            if JOINT:
                zero = tl.zeros((BLOCK_N, SPAN), tl.float32)
                b_dup = scaling * dot(
                    b_dy.T, rounded(b_share, b_dy.dtype, PRECISION), zero, PRECISION
                )  # [n, m] [m, r]
                start = item.to(tl.int64) * N * SPAN
                store_block(
                    dup + start, b_dup, n, 0, N, SPAN, SPAN, BLOCK_N, SPAN, False, PRECISION
                )
        wide = spread_gates(b_gates, weights, o_rank, E, EDGES, GATED)
        if GATED:
            b_low = load_block(
                low, row, rank, M, EDGES[E], EDGES[E], BLOCK_M, BLOCK_R, False, False
            )
            products = spread * b_low.to(tl.float32)
            for e in tl.static_range(E):
                mine = tl.where(owned(o_rank, e, EDGES)[None, :], products, 0.0)
                here = tl.arange(0, GATES)[None, :] == e
                dgates += tl.where(here, tl.sum(mine, 1)[:, None], 0.0)
        store_block(
            dlow,
            spread * wide,
            row,
            rank,
            M,
            RANKS,
            RANKS,
            BLOCK_M,
            BLOCK_R,
            False,
            PRECISION,
        )
    if GATED:
        mean = tl.sum(b_gates * dgates, 1)[:, None]
        b_dlogits = b_gates * (dgates - mean)
        store_block(dlogits, b_dlogits, row, 0, M, GATES, GATES, BLOCK_M, GATES, False, PRECISION)


@triton.jit
def load_gated(
    low,
    b_gates,
    weights,
    row,
    rank,
    M,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GATED: tl.constexpr,
):
    """S = g P [BLOCK_M, BLOCK_R] in float32, made again from P."""
    b_low = load_block(low, row, rank, M, EDGES[E], EDGES[E], BLOCK_M, BLOCK_R, False, False)
    o_rank = rank + tl.arange(0, BLOCK_R)
    wide = spread_gates(b_gates, weights, o_rank, E, EDGES, GATED)
    return b_low.to(tl.float32) * wide


def spread_outputs(
    dy: Tensor, ranks: Ranks, gated: bool, span: Span | None, block_m: int
) -> Callable[[Tensor], tuple[Tensor, Tensor | None, Tensor | None]]:
    """Plans where `spread_rows` writes: dP, s dl if there is a mixer, dB's shares for a span."""
    m, n = dy.shape
    shares = (triton.cdiv(m, block_m), n, span.width) if span else None

    def run(dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dlow = dy.new_empty(m, ranks.padded)
        dlogits = dy.new_empty(m, GATES.value, dtype=torch.float32) if gated else None
        dup = None if shares is None else dy.new_empty(shares, dtype=torch.float32)
        return dlow, dlogits, dup

    return run

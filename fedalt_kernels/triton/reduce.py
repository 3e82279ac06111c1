"""The sums over tokens: dA and dG in one pass over x, and dB in one over dY.

Every sum is made of shares, one a run of rows, which are added in a fixed order: runs repeat bit
for bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    GATES,
    LOGITS,
    dot,
    kept_bits,
    load_block,
    rounded,
    split_parts,
    store_block,
)
from .strips import load_gated
from .tiles import Ranks, described, precision, tile_for

MOST_SHARES = 8


@triton.jit(do_not_specialize=["M", "chunk"])
def _reduce(
    source,
    factor,
    gates,
    weights,
    words,
    shares,
    scaling,
    M,
    chunk,
    stride_source,
    C: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    FIRST: tl.constexpr,
    SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    MAKES_UP: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One share: sourceᵀ · factor over `chunk` rows, for BLOCK_C columns and BLOCK_R ranks.

    MAKES_UP: source is dY, factor is P to be gated, and shares of dB [shares, C, SPAN] result.
    Else source is x, under the mask if DROPOUT; factor is dP [M, COLUMNS], and `gates`, if GATED,
    are dl [M, 8]: shares of dA and below it, if GATED, of dG [shares, SPAN + 8, C] result.
    """
    at = tl.program_id(0) * BLOCK_C
    share = tl.program_id(1)
    rank = tl.program_id(2) * BLOCK_R
    EVEN_C: tl.constexpr = C % BLOCK_C == 0
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    parts = tl.zeros((BLOCK_C, LOGITS), tl.float32)
    first = share * chunk
    last = min(M, first + chunk)
    tl.assume(first < last)  # else ptxas waits for every product before the next (C7515)
    for row in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        b_source = load_block(
            source, row, at, M, C, stride_source, BLOCK_M, BLOCK_C, EVEN_M and EVEN_C, TMA
        )
        if MAKES_UP:
            if GATED:
                b_gates = load_block(gates, row, 0, M, E, E, BLOCK_M, GATES, False, False)
            else:
                b_gates = tl.zeros((BLOCK_M, GATES), tl.float32)
            b_gated = load_gated(
                factor,
                b_gates,
                weights,
                row,
                FIRST + rank,
                M,
                E,
                EDGES,
                BLOCK_M,
                BLOCK_R,
                GATED,
            )
            b_factor = rounded(b_gated, b_source.dtype, PRECISION)
        else:
            b_factor = load_block(
                factor, row, FIRST + rank, M, COLUMNS, COLUMNS, BLOCK_M, BLOCK_R, False, False
            )
            if GATED:
                o_part = tl.arange(0, LOGITS)
                p_part = gates + (row + tl.arange(0, BLOCK_M))[:, None].to(tl.int64) * GATES
                m_part = (row + tl.arange(0, BLOCK_M) < M)[:, None]
                b_part = tl.load(p_part + (o_part % GATES)[None, :], mask=m_part, other=0.0)
                is_low = (o_part >= GATES)[None, :]
                b_part = split_parts(b_part, is_low, b_source.dtype, PRECISION)
                parts = dot(b_source.T, b_part, parts, PRECISION)  # [c, m] [m, 16]
            if DROPOUT:
                keep = kept_bits(words, row, at, M, C, BLOCK_M, BLOCK_C)
                b_source = tl.where(keep, b_source, 0.0).to(b_source.dtype)
        acc = dot(b_source.T, b_factor, acc, PRECISION)  # [c, m] [m, r]
    if MAKES_UP:
        shares += share.to(tl.int64) * C * SPAN
        store_block(
            shares, acc * scaling, at, rank, C, SPAN, SPAN, BLOCK_C, BLOCK_R, False, PRECISION
        )
    else:
        ROWS: tl.constexpr = SPAN + GATES if GATED else SPAN
        shares += share.to(tl.int64) * C * ROWS
        store_block(shares, acc.T, rank, at, SPAN, C, C, BLOCK_R, BLOCK_C, False, PRECISION)
        if GATED:
            if rank == 0:
                b_mixer = tl.sum(tl.reshape(parts, (BLOCK_C, 2, GATES)), 1).T
                store_block(shares, b_mixer, SPAN, at, ROWS, C, C, GATES, BLOCK_C, False, PRECISION)


def reduce_down(
    x: Tensor,
    dlow: Tensor,
    dlogits: Tensor | None,
    ranks: Ranks,
    span: tuple[int, int],
    words: Tensor | None,
) -> Tensor:
    """dA of a span of ranks and below it, if there is dl, dG: [ranks (+ 8), K] in float32.

    Args:
        x: [M, K].
        dlow, dlogits: dP [M, RANKS] and dl [M, 8] from `spread`; no dl where dG is not wanted.
        span: as of `spread`.
        words: the mask, from `dropout.mask_words`, or None without dropout.
    """
    e = len(ranks.edges) - 1
    shares = _launch_reduce(x, dlow, dlogits, (1.0,) * e, ranks, 1.0, span, words, makes_up=False)
    return shares.sum(0)


def reduce_up(
    dy: Tensor,
    low: Tensor,
    gates: Tensor | None,
    weights: Sequence[float],
    ranks: Ranks,
    scaling: float,
    span: tuple[int, int],
) -> Tensor:
    """Shares of dB, [shares, N, ranks], where `spread` made none: a second pass over dY."""
    return _launch_reduce(dy, low, gates, weights, ranks, scaling, span, None, makes_up=True)


def _launch_reduce(
    source: Tensor,
    factor: Tensor,
    gates: Tensor | None,
    weights: Sequence[float],
    ranks: Ranks,
    scaling: float,
    span: tuple[int, int],
    words: Tensor | None,
    *,
    makes_up: bool,
) -> Tensor:
    m, c = source.shape
    first, width = span
    block_r = min(width, ranks.block)
    tile, tma = tile_for("reduce", ranks, source, dropout=words is not None)
    count = min(MOST_SHARES, triton.cdiv(m, tile.m))
    chunk = triton.cdiv(triton.cdiv(m, count), tile.m) * tile.m
    count = triton.cdiv(m, chunk)  # no share is empty
    shape = (c, width) if makes_up else (width + (gates is not None) * GATES.value, c)
    shares = source.new_empty(count, *shape, dtype=torch.float32)
    _reduce[(triton.cdiv(c, tile.n), count, triton.cdiv(width, block_r))](
        source=described(source, tile.m, tile.n, tma),
        factor=factor,
        gates=gates,
        weights=tuple(weights),
        words=words,
        shares=shares,
        scaling=float(scaling),
        M=m,
        chunk=chunk,
        stride_source=source.stride(0),
        C=c,
        E=len(ranks.edges) - 1,
        EDGES=ranks.edges,
        FIRST=first,
        SPAN=width,
        COLUMNS=factor.shape[1],
        BLOCK_M=tile.m,
        BLOCK_C=tile.n,
        BLOCK_R=block_r,
        STAGES=tile.stages,
        GATED=gates is not None,
        MAKES_UP=makes_up,
        DROPOUT=words is not None,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(source.dtype),
        num_warps=tile.warps,
    )
    return shares

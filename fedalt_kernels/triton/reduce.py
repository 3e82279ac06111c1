"""The sums over tokens: dA and dG in one pass over x, and dB in one over dY.

Every sum is made of shares, one a run of rows.  Whoever makes the last share of a piece adds all of
them up, in their order, and writes the gradient in its parameter's dtype: runs repeat bit for bit.
Where programs cannot order their memory accesses there is one share.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .primitives import (
    GATES,
    LOGITS,
    dot,
    kept_bits,
    load_block,
    rounded,
    split_parts,
)
from .strips import load_gated
from .sums import store_share, store_sum, sum_shares, sum_ups
from .tiles import Ranks, Span, boxed, precision, publishes, tile_for
from .workspace import counters

MOST_SHARES = 8


@triton.jit
def reduce_share(
    at,
    share,
    rank,
    source,
    factor,
    gates,
    words,
    shares,
    out,
    arrived,
    weights,
    scaling,
    M,
    chunk,
    count,
    stride_source,
    C: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    MAKES_UP: tl.constexpr,
    SHARED: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`_reduce` for one share of one piece, and the sum of all shares where it is the last."""
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
    b_mixer = tl.zeros((BLOCK_C, GATES), tl.float32)
    if MAKES_UP:
        acc *= scaling
    elif GATED:
        b_mixer = tl.sum(tl.reshape(parts, (BLOCK_C, 2, GATES)), 1)
    is_last = True
    if SHARED:
        store_share(
            shares, acc, b_mixer, share, rank, at, C, SPAN, WIDTH, BLOCK_C, BLOCK_R, PRECISION
        )
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == count - 1
    if is_last:
        if SHARED:
            tl.store(arrived, 0)
            acc, b_mixer = sum_shares(shares, count, rank, at, C, SPAN, WIDTH, BLOCK_C, BLOCK_R)
        store_sum(
            out,
            acc,
            b_mixer,
            rank,
            at,
            C,
            E,
            EDGES,
            FIRST,
            LAST,
            SPAN,
            WIDTH,
            BLOCK_C,
            BLOCK_R,
            MAKES_UP,
            PRECISION,
        )


@triton.jit(do_not_specialize=["M", "chunk", "count", "blocks"])
def _reduce(
    source,
    factor,
    gates,
    words,
    shares,
    out,
    dup,
    out_up,
    counts,
    weights,
    scaling,
    M,
    chunk,
    count,
    blocks,
    stride_source,
    C: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FIRST_UP: tl.constexpr,
    LAST_UP: tl.constexpr,
    SPAN_UP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    MAKES_UP: tl.constexpr,
    SHARED: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One share: sourceᵀ · factor over `chunk` rows, for BLOCK_C columns and BLOCK_R ranks.

    MAKES_UP: source is dY, factor is P to be gated, and dB of the ranks from FIRST to LAST result,
    `out` as of `sums.store_ups`.  Else source is x, under the mask if DROPOUT; factor is dP
    [M, COLUMNS], and `gates`, if GATED, are dl [M, 8]: dA and below it, if GATED, dG result, `out`
    [SPAN + 8, C]; and the last programs are `sums.sum_ups`, if SPAN_UP.
    """
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    PIECES: tl.constexpr = TILES * ((SPAN + BLOCK_R - 1) // BLOCK_R)
    program = tl.program_id(0)
    if program < PIECES * count:
        reduce_share(
            program % TILES * BLOCK_C,
            program // TILES % count,
            program // TILES // count * BLOCK_R,
            source,
            factor,
            gates,
            words,
            shares,
            out,
            counts + program % TILES + program // TILES // count * TILES,
            weights,
            scaling,
            M,
            chunk,
            count,
            stride_source,
            C,
            E,
            EDGES,
            FIRST,
            LAST,
            SPAN,
            WIDTH,
            COLUMNS,
            BLOCK_M,
            BLOCK_C,
            BLOCK_R,
            STAGES,
            GATED,
            MAKES_UP,
            SHARED,
            DROPOUT,
            EVEN_M,
            TMA,
            PRECISION,
        )
    elif SPAN_UP:
        sum_ups(
            program - PIECES * count,
            dup,
            out_up,
            blocks,
            OUTPUTS,
            E,
            EDGES,
            FIRST_UP,
            LAST_UP,
            SPAN_UP,
            BLOCK_C,
            PRECISION,
        )


def reducing(
    source: Tensor,
    columns: int,
    gated: bool,
    weights: Sequence[float],
    ranks: Ranks,
    scaling: float,
    span: Span,
    dtype: torch.dtype,
    *,
    makes_up: bool,
    dropout: bool = False,
    joint: tuple[int, int, Span] | None = None,
) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    """Plans the sums over tokens of a span of ranks.

    Args:
        source: x [M, K], or for `makes_up` dY [M, N], or one like it.
        columns: of the factor, dP [M, RANKS] or P [M, R].
        gated: whether dG is made too; for `makes_up`, whether there are gates.
        span: as of `backward.spreading`.
        dtype: of the gradients.
        dropout: whether the mask's words come with x.
        joint: where shares of dB are to be added up on the way: their number, N and their span.

    Returns:
        Of x, dP, dl [M, 8] or None, the mask's words or None and shares of dB or None: dA and below
        it, if gated, dG, [ranks (+ 8), K]; and dB or None.  For `makes_up`, of dY, P and the gates:
        nothing and dB.  dB is [N r_e] for one adapter of the span after the other, flat.
    """
    (m, c), (first, width, last) = source.shape, span
    block_r = min(width, ranks.block)
    tile, tma = tile_for("reduce", ranks, source, dropout=dropout)
    count = min(MOST_SHARES if publishes(source.device) else 1, triton.cdiv(m, tile.m))
    chunk = triton.cdiv(triton.cdiv(m, count), tile.m) * tile.m
    count = triton.cdiv(m, chunk)  # no share is empty
    rows = width + (gated and not makes_up) * GATES.value
    blocks, outputs, (first_up, width_up, last_up) = joint or (0, 0, Span(0, 0, 0))
    pieces = triton.cdiv(c, tile.n) * triton.cdiv(width, block_r)
    launch = Launch(
        _reduce,
        (pieces * count + triton.cdiv(outputs, tile.n),),
        (
            *("source", "factor", "gates", "words"),
            *("shares", "out", "dup", "out_up", "counts"),
        ),
        {"source": boxed(m, c, source.stride(0), (tile.m, tile.n), tma)},
        tile.warps,
        weights=tuple(weights),
        scaling=float(scaling),
        M=m,
        chunk=chunk,
        count=count,
        blocks=blocks,
        stride_source=source.stride(0),
        C=c,
        E=len(ranks.edges) - 1,
        EDGES=ranks.edges,
        FIRST=first,
        LAST=last,
        SPAN=width,
        WIDTH=rows,
        COLUMNS=columns,
        OUTPUTS=outputs,
        FIRST_UP=first_up,
        LAST_UP=last_up,
        SPAN_UP=width_up,
        BLOCK_M=tile.m,
        BLOCK_C=tile.n,
        BLOCK_R=block_r,
        STAGES=tile.stages,
        GATED=gated,
        MAKES_UP=makes_up,
        SHARED=count > 1,
        DROPOUT=dropout,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(source.dtype),
    )
    shape = (c * (last - first),) if makes_up else (rows, c)

    def run(
        source: Tensor,
        factor: Tensor,
        gates: Tensor | None,
        words: Tensor | None = None,
        dup: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        shares = source.new_empty(count, c, rows, dtype=torch.float32) if count > 1 else None
        out = source.new_empty(shape, dtype=dtype)
        out_up = None
        if dup is not None:
            out_up = source.new_empty(outputs * (last_up - first_up), dtype=dtype)
        counts = counters(source.device, pieces)
        launch(source, factor, gates, words, shares, out, dup, out_up, counts)
        return (None, out) if makes_up else (out, out_up)

    return run

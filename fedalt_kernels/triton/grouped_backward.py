"""Backward for many clients: dP and dl of all rows in one launch, and every client's own sums.

A client's sum over its rows is one program's, in the rows' order, so runs repeat bit for bit
however the clients lie beside one another.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .clients import Stack, Table, block_of, blocks_at_most, rows_of
from .dropout import mask_bits
from .launch import Launch
from .primitives import GATES, MASK_GROUP
from .reduce import reduce_share
from .strips import spread_outputs, spread_rows
from .tiles import Ranks, Span, precision, tile_through_pointers

BLOCK = 256  # words of a mask


@triton.jit
def _spread_clients(
    dy,
    up,
    low,
    gates,
    weights,
    dlow,
    dlogits,
    blocks,
    starts,
    stride_dy,
    N: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`spread_rows` for every block of a client's rows."""
    client, place, start, rows = block_of(blocks, starts, tl.program_id(0))
    if place * BLOCK_M < rows:
        spread_rows(
            place,
            dy + start * stride_dy,
            up + client * N * RANKS,
            low + start * EDGES[E],
            gates + start * E if GATED else gates,
            weights,
            1.0,
            dlow + start * RANKS,
            dlogits + start * GATES if GATED else dlogits,
            None,
            rows,
            stride_dy,
            N,
            E,
            EDGES,
            RANKS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
            0,
            0,
            STAGES,
            GATED,
            False,
            False,
            False,
            PRECISION,
        )


def spreading_clients(
    dy: Tensor, count: int, gated: bool, weights: Sequence[float], ranks: Ranks
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Plans dP and dl of the sorted rows of C clients.

    Args:
        dy: [M, N], or one like it.
        count: C.
        gated: whether there are mixers; else `weights`, E fixed gates, gate.

    Returns:
        Of dY, the stack, P [M, R], g [M, E] or None and the table: dP [M, RANKS] in dY's dtype and
        dl [M, 8] in float32, or None without gates.
    """
    m, n = dy.shape
    tile = tile_through_pointers("spread", dy)
    outputs = spread_outputs(dy, ranks, gated, None, tile.m)
    launch = Launch(
        _spread_clients,
        (blocks_at_most(m, count, tile.m),),
        ("dy", "up", "low", "gates", "dlow", "dlogits", "blocks", "starts"),
        None,
        tile.warps,
        weights=tuple(weights),
        stride_dy=dy.stride(0),
        N=n,
        E=len(ranks.edges) - 1,
        EDGES=ranks.edges,
        RANKS=ranks.padded,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=ranks.block,
        STAGES=tile.stages,
        GATED=gated,
        PRECISION=precision(dy.dtype),
    )

    def run(
        dy: Tensor, stack: Stack, low: Tensor, gates: Tensor | None, table: Table
    ) -> tuple[Tensor, Tensor | None]:
        dlow, dlogits, _ = outputs(dy)
        launch(dy, stack.up, low, gates, dlow, dlogits, *table)
        return dlow, dlogits

    return run


@triton.jit
def _sum_clients(
    source,
    factor,
    gates,
    words,
    out,
    starts,
    weights,
    scaling,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`reduce._reduce` without shares, over one client's rows; nothing where it has none."""
    CALLS: tl.constexpr = (C + MASK_GROUP - 1) // MASK_GROUP
    GATE_COLUMNS: tl.constexpr = E if MAKES_UP else GATES
    SIZE: tl.constexpr = (LAST - FIRST if MAKES_UP else WIDTH) * C
    client = tl.program_id(2).to(tl.int64)
    start, rows = rows_of(starts, client)
    if rows > 0:
        reduce_share(
            tl.program_id(0) * BLOCK_C,
            0,
            tl.program_id(1) * BLOCK_R,
            source + start * stride_source,
            factor + start * COLUMNS,
            gates + start * GATE_COLUMNS if GATED else gates,
            words + start * CALLS if DROPOUT else words,
            None,
            out + client * SIZE,
            None,
            weights,
            scaling,
            rows,
            rows,
            1,
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
            False,
            DROPOUT,
            False,
            False,
            PRECISION,
        )


def summing_clients(
    source: Tensor,
    count: int,
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
) -> Callable[..., Tensor]:
    """Plans every client's sums over its rows, of a span of ranks; arguments as of `reducing`.

    Returns:
        Of x, dP, dl or None, the masks' words or None and the table: dA and below it, if gated, dG,
        [C, ranks + 8, K].  For `makes_up`, of dY, P, the gates or None, None and the table: dB,
        [C, N ranks], [N r_e] for one adapter of the span after the other.  Zero for a client
        without rows.
    """
    c, (first, width, last) = source.shape[1], span
    tile, block_r = tile_through_pointers("reduce", source), min(width, ranks.block)
    rows = width + (gated and not makes_up) * GATES.value
    launch = Launch(
        _sum_clients,
        (triton.cdiv(c, tile.n), triton.cdiv(width, block_r), count),
        ("source", "factor", "gates", "words", "out", "starts"),
        None,
        tile.warps,
        weights=tuple(weights),
        scaling=float(scaling),
        stride_source=source.stride(0),
        C=c,
        E=len(ranks.edges) - 1,
        EDGES=ranks.edges,
        FIRST=first,
        LAST=last,
        SPAN=width,
        WIDTH=rows,
        COLUMNS=columns,
        BLOCK_M=tile.m,
        BLOCK_C=tile.n,
        BLOCK_R=block_r,
        STAGES=tile.stages,
        GATED=gated,
        MAKES_UP=makes_up,
        DROPOUT=dropout,
        PRECISION=precision(source.dtype),
    )
    shape = (count, c * (last - first)) if makes_up else (count, rows, c)

    def run(
        source: Tensor, factor: Tensor, gates: Tensor | None, words: Tensor | None, table: Table
    ) -> Tensor:
        out = source.new_zeros(shape, dtype=dtype)
        launch(source, factor, gates, words, out, table.starts)
        return out

    return run


@triton.jit
def _mask_clients(
    seeds,
    words,
    blocks,
    starts,
    threshold,
    CALLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The words of a block of a client's rows, counted from its own first row."""
    client, place, start, rows = block_of(blocks, starts, tl.program_id(0))
    o_word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_word = o_word < min(BLOCK_M, rows - place * BLOCK_M) * CALLS
    o_word += place.to(tl.int64) * BLOCK_M * CALLS
    bits = mask_bits(tl.load(seeds + client), o_word.to(tl.uint64), threshold)
    tl.store(words + start * CALLS + o_word, bits, mask=m_word)


def masking_clients(
    x: Tensor, count: int, height: int, threshold: int
) -> Callable[[Tensor, Table], Tensor]:
    """As `dropout.masking`, of C seeds and a table whose blocks have so many rows."""
    m, k = x.shape
    calls = triton.cdiv(k, MASK_GROUP.value)
    launch = Launch(
        _mask_clients,
        (blocks_at_most(m, count, height), triton.cdiv(height * calls, BLOCK)),
        ("seeds", "words", "blocks", "starts"),
        threshold=threshold,
        CALLS=calls,
        BLOCK_M=height,
        BLOCK=BLOCK,
    )

    def run(seeds: Tensor, table: Table) -> Tensor:
        words = torch.empty(m, calls, dtype=torch.int32, device=seeds.device)
        launch(seeds, words, *table)
        return words

    return run

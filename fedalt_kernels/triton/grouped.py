"""Forward for many clients: the narrow products of all in one launch, and what adds them to y.

The base product comes ready made.  `expanding` also adds the adapters' part to dX.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .clients import Stack, Table, block_of, blocks_at_most
from .launch import Launch
from .primitives import (
    GATES,
    LOGITS,
    MASK_GROUP,
    add_bias,
    add_mixer,
    add_strip,
    kept_bits,
    load_block,
    store_block,
)
from .strips import project_rows
from .tiles import Ranks, precision, tile_through_pointers

WARPS = 8  # of `_expand_clients`: four would spill on sm_100


@triton.jit
def _project_clients(
    x,
    down,
    router,
    weights,
    seeds,
    low,
    gated,
    gates,
    blocks,
    starts,
    threshold,
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
    PRECISION: tl.constexpr,
):
    """`project_rows` for every block of a client's rows and every block of ranks."""
    RANK_BLOCKS: tl.constexpr = RANKS // BLOCK_R
    index = tl.program_id(0) // RANK_BLOCKS
    client, place, start, rows = block_of(blocks, starts, index)
    if place * BLOCK_M < rows:
        project_rows(
            place * RANK_BLOCKS + tl.program_id(0) % RANK_BLOCKS,
            x + start * stride_x,
            down,
            router,
            weights,
            tl.load(seeds + client) if DROPOUT else 0,
            threshold,
            low + start * EDGES[E],
            gated + start * RANKS,
            gates + start * E if GATED else gates,
            rows,
            stride_x,
            (client * RANKS).to(tl.int32),
            (client * LOGITS).to(tl.int32),
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
            False,
            False,
            PRECISION,
        )


def projecting_clients(
    x: Tensor, count: int, gated: bool, weights: Sequence[float], ranks: Ranks, threshold: int
) -> Callable[[Tensor, Stack, Tensor | None, Table], tuple[Tensor, Tensor, Tensor | None]]:
    """Plans P, S and the gates of the sorted rows x [M, K] of C clients.

    Args:
        x: or one like it.
        count: C.
        gated: whether there are mixers; else `weights`, E fixed gates, gate.
        threshold: bytes of the mask below it are dropped.

    Returns:
        Of x, the stack, under dropout the seeds, int64 [C], and the table: P [M, R] and S
        [M, RANKS] in x's dtype, gates [M, E] in float32 or None.
    """
    (m, k), e = x.shape, len(ranks.edges) - 1
    tile = tile_through_pointers("project", x)
    launch = Launch(
        _project_clients,
        (blocks_at_most(m, count, tile.m) * (ranks.padded // ranks.block),),
        ("x", "down", "router", "seeds", "low", "gated", "gates", "blocks", "starts"),
        None,
        tile.warps,
        weights=tuple(weights),
        threshold=threshold,
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
        PRECISION=precision(x.dtype),
    )

    def run(
        x: Tensor, stack: Stack, seeds: Tensor | None, table: Table
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        low, strip = x.new_empty(m, ranks.edges[-1]), x.new_empty(m, ranks.padded)
        gates = x.new_empty(m, e, dtype=torch.float32) if gated else None
        launch(x, stack.down, stack.router, seeds, low, strip, gates, *table)
        return low, strip, gates

    return run


@triton.jit
def _expand_clients(
    out,
    strip,
    side,
    bias,
    dlogits,
    mixer,
    words,
    blocks,
    starts,
    C: tl.constexpr,
    E: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BACKWARD: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [M, C] += strip · side + bias, or + the mixer's term, masked; side is the client's."""
    TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    CALLS: tl.constexpr = (C + MASK_GROUP - 1) // MASK_GROUP
    client, place, start, rows = block_of(blocks, starts, tl.program_id(0) // TILES)
    row, at = place * BLOCK_M, tl.program_id(0) % TILES * BLOCK_N
    if row < rows:
        out += start * C
        acc = add_strip(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            strip + start * RANKS,
            side + client * C * RANKS,
            row,
            at,
            rows,
            C,
            RANKS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
            not BACKWARD,
            PRECISION,
        )
        if DROPOUT:
            kept = kept_bits(words + start * CALLS, row, at, rows, C, BLOCK_M, BLOCK_N)
            acc = tl.where(kept, acc, 0.0)
        ready = load_block(out, row, at, rows, C, C, BLOCK_M, BLOCK_N, False, False)
        acc += ready.to(tl.float32)
        if BIAS:
            acc = add_bias(acc, bias, at, C, BLOCK_N)
        if GATED:
            dlogits += start * GATES
            mixer += client * E * C
            acc = add_mixer(acc, dlogits, mixer, row, at, rows, C, E, BLOCK_M, BLOCK_N)
        store_block(out, acc, row, at, rows, C, C, BLOCK_M, BLOCK_N, False, PRECISION)


def expanding_clients(
    x: Tensor,
    columns: int,
    count: int,
    ranks: Ranks,
    *,
    bias: bool = False,
    backward: bool = False,
    gated: bool = False,
    dropout: bool = False,
) -> Callable[..., None]:
    """Plans, forward, y += S upᵀ + b; backward, dX += mask ⊙ (dP down) + dl G: for C clients.

    Args:
        x: or one with as many rows.
        columns: N, or backward K.
        count: C.
        bias: whether there is one.
        backward: which of the two.
        gated: backward, whether there are mixers.
        dropout: backward, whether there are masks.

    Returns:
        Of out (y or dX), strip (S or dP [M, RANKS]), side (the stack's up or down), bias [N], dl
        [M, 8] in float32, mixer [C, E, K], the masks' words, each None where there is none, and the
        table: nothing, since it adds to out.
    """
    tile = tile_through_pointers("contract", x)
    launch = Launch(
        _expand_clients,
        (blocks_at_most(x.shape[0], count, tile.m) * triton.cdiv(columns, tile.n),),
        ("out", "strip", "side", "bias", "dlogits", "mixer", "words", "blocks", "starts"),
        None,
        WARPS,
        C=columns,
        E=len(ranks.edges) - 1,
        RANKS=ranks.padded,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=min(ranks.block, tile.k),
        BACKWARD=backward,
        BIAS=bias,
        GATED=gated,
        DROPOUT=dropout,
        PRECISION=precision(x.dtype),
    )

    def run(
        out: Tensor,
        strip: Tensor,
        side: Tensor,
        bias: Tensor | None,
        dlogits: Tensor | None,
        mixer: Tensor | None,
        words: Tensor | None,
        table: Table,
    ) -> None:
        launch(out, strip, side, bias, dlogits, mixer, words, *table)

    return run

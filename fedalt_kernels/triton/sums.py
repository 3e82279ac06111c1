"""How shares of a sum over tokens become a gradient, in a fixed order."""

import triton
import triton.language as tl

from .primitives import GATES, load_block, rounded, store_block


@triton.jit
def store_share(
    shares,
    acc,
    b_mixer,
    share,
    rank,
    at,
    C: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Into shares [count, C, WIDTH], whose last 8 columns are dG's where WIDTH is above SPAN."""
    shares += share.to(tl.int64) * C * WIDTH
    store_block(shares, acc, at, rank, C, SPAN, WIDTH, BLOCK_C, BLOCK_R, False, PRECISION)
    if WIDTH > SPAN:
        if rank == 0:
            store_block(
                shares, b_mixer, at, SPAN, C, WIDTH, WIDTH, BLOCK_C, GATES, False, PRECISION
            )


@triton.jit
def sum_shares(
    shares,
    count,
    rank,
    at,
    C: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The sums of what `store_share` has stored for one piece."""
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    b_mixer = tl.zeros((BLOCK_C, GATES), tl.float32)
    for _ in tl.range(0, count):
        acc += load_block(shares, at, rank, C, SPAN, WIDTH, BLOCK_C, BLOCK_R, False, False)
        if WIDTH > SPAN:
            b_mixer += load_block(shares, at, SPAN, C, WIDTH, WIDTH, BLOCK_C, GATES, False, False)
        shares += C * WIDTH
    return acc, b_mixer


@triton.jit
def store_sum(
    out,
    acc,
    b_mixer,
    rank,
    at,
    C: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MAKES_UP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dB as of `store_ups`, or dA and below it dG: out [WIDTH, C]."""
    if MAKES_UP:
        store_ups(out, acc, at, FIRST + rank, C, E, EDGES, FIRST, LAST, BLOCK_C, BLOCK_R, PRECISION)
    else:
        store_block(out, acc.T, rank, at, SPAN, C, C, BLOCK_R, BLOCK_C, False, PRECISION)
        if WIDTH > SPAN:
            if rank == 0:
                store_block(out, b_mixer.T, SPAN, at, WIDTH, C, C, GATES, BLOCK_C, False, PRECISION)


@triton.jit
def store_ups(
    out,
    block,
    row,
    rank,
    N: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of dB at (row, rank) into matrices [N, r_e] that follow one another from FIRST on."""
    o_row = (row + tl.arange(0, HEIGHT)).to(tl.int64)[:, None]
    o_rank = (rank + tl.arange(0, WIDTH))[None, :]
    place = o_row * 0 + o_rank * 0
    for e in tl.static_range(E):
        if EDGES[e] >= FIRST and EDGES[e] < LAST:
            mine = N * (EDGES[e] - FIRST) + o_row * (EDGES[e + 1] - EDGES[e]) + o_rank - EDGES[e]
            place = tl.where((o_rank >= EDGES[e]) & (o_rank < EDGES[e + 1]), mine, place)
    inside = (o_row < N) & (o_rank < LAST)
    tl.store(out + place, rounded(block, out.dtype.element_ty, PRECISION), mask=inside)


@triton.jit
def sum_ups(
    item,
    dup,
    out_up,
    blocks,
    N: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SPAN: tl.constexpr,
    HEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dB of HEIGHT outputs from its shares dup [blocks, N, SPAN], one of each block of rows."""
    at = item * HEIGHT
    acc = tl.zeros((HEIGHT, SPAN), tl.float32)
    for _ in tl.range(0, blocks, num_stages=4):
        acc += load_block(dup, at, 0, N, SPAN, SPAN, HEIGHT, SPAN, N % HEIGHT == 0, False)
        dup += N * SPAN
    store_ups(out_up, acc, at, FIRST, N, E, EDGES, FIRST, LAST, HEIGHT, SPAN, PRECISION)

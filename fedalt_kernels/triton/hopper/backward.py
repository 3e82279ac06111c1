"""Backward in one launch: dX, dP, dl, then dA, dG and dB.

dX as y in `forward`: the tiles of its first columns make the strip, beside dY W they multiply the
block of dY in shared memory with `up`, T = dY up, and from that, P and the gates come dP and dl.
strip [M, SIDE] is [dl's parts | dP], and `side` [SIDE, K] the mixer's rows and A:
dX = dY W + strip · side, the last step of every tile.  Under dropout dP's share of it is made in
quarters of a tile, masked, and added.  The sums over tokens, `sums`, are the last items.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .blocks import dropped, halves, product_layout, store_part, store_tile, words_of
from .dlogits import leave_part, store_dlogits
from .gates import owned_gate
from .ring import (
    advance,
    await_item,
    finish,
    hand_over,
    leave_clean,
    make_ring,
    multiply,
    place,
    publish,
    take,
    turned,
    wait_for,
)
from .sums import produce_sum, sum_downs, sum_ups

# Counters before the row blocks' flags: ticket, left, row blocks announced.
FLAGS = gl.constexpr(3)


class Slots(NamedTuple):
    """Shared memory by slot."""

    xs: Any  # of dY
    ws: Any  # of W
    ns: Any  # of `up`, a maker's ranks
    ss: Any  # of the strip, where dY is in other steps
    us: Any  # of `side`, where W is


class Sums(NamedTuple):
    """Shared memory by slot in a sum over tokens, in the places of dY and W."""

    cx: Any  # of x
    fx: Any  # of the strip
    cy: Any  # of dY
    fy: Any  # of S


@gluon.jit
def _produce_tile(dy, weight, up, strip, side, slots, ring, counts, slot, phase, item, tiles_m,
                  S: gl.constexpr):  # fmt: skip
    tile_m, tile_n, makes = place(item, tiles_m, S)
    row = tile_m * S.BLOCK_M
    column = tile_n * S.BLOCK_N
    for n in range(0, S.N, S.BLOCK_K):
        ready = ring.ready.index(slot)
        mbarrier.wait(ring.empty.index(slot), phase)
        if makes:
            mbarrier.expect(ready, (S.BLOCK_M + S.BLOCK_N + S.WIDTH) * S.BLOCK_K * 2)
            at = tile_n * S.WIDTH
            tma.async_copy_global_to_shared(up, [n, at], ready, slots.ns.index(slot))
        else:
            mbarrier.expect(ready, (S.BLOCK_M + S.BLOCK_N) * S.BLOCK_K * 2)
        tma.async_copy_global_to_shared(dy, [row, n], ready, slots.xs.index(slot))
        if S.OUT_MAJOR:
            tma.async_copy_global_to_shared(weight, [column, n], ready, slots.ws.index(slot))
        else:
            tma.async_copy_global_to_shared(weight, [n, column], ready, slots.ws.index(slot))
        slot, phase = advance(slot, phase, S.STAGES)
    for s in range(0, S.SIDE, S.BLOCK_S):
        ready = ring.ready.index(slot)
        mbarrier.wait(ring.empty.index(slot), phase)
        if s == 0:
            wait_for(counts + FLAGS + tile_m, S.COUNT)
        mbarrier.expect(ready, (S.BLOCK_M + S.BLOCK_N) * S.BLOCK_S * 2)
        at = slot * (S.BLOCK_K // S.BLOCK_S)
        tma.async_copy_global_to_shared(strip, [row, s], ready, slots.ss.index(at))
        tma.async_copy_global_to_shared(side, [s, column], ready, slots.us.index(at))
        slot, phase = advance(slot, phase, S.STAGES)
    return slot, phase


@gluon.jit
def _produce(
    dy,
    weight,
    up,
    strip,
    side,
    x_columns,
    strip_rows,
    dy_columns,
    gated_rows,
    slots,
    sums,
    ring,
    counts,
    M,
    tiles_m,
    chunk,
    shares,
    S: gl.constexpr,
):
    tiles = tiles_m * S.TILES_N
    slot = 0
    phase = 1
    item = take(counts)
    while item < tiles + S.PIECES * shares:
        hand_over(ring, slot, phase, item)
        if item < tiles:
            slot, phase = _produce_tile(
                dy, weight, up, strip, side, slots, ring, counts, slot, phase, item, tiles_m, S
            )
        elif S.PIECES > 0:
            wait_for(counts + 2, tiles_m * S.COUNT)
            piece = (item - tiles) % S.PIECES
            first = (item - tiles) // S.PIECES * chunk
            end = min(M, first + chunk)
            if piece < S.PIECES_X:
                if S.WIDTH_X > 0:
                    slot, phase = produce_sum(
                        x_columns, strip_rows, sums.cx, sums.fx, ring, slot, phase,
                        piece * S.COLUMNS, first, end, S.ROWS_X, S.WIDTH_X, S,
                    )  # fmt: skip
            else:
                if S.WIDTH_Y > 0:
                    slot, phase = produce_sum(
                        dy_columns, gated_rows, sums.cy, sums.fy, ring, slot, phase,
                        (piece - S.PIECES_X) * S.COLUMNS, first, end, S.ROWS_Y, S.WIDTH_Y, S,
                    )  # fmt: skip
        item = take(counts)
    hand_over(ring, slot, phase, item)
    mbarrier.arrive(ring.ready.index(slot), count=1)


@gluon.jit
def _make_strip(
    spread,
    p_strip,
    p_gated,
    p_partial,
    p_low,
    p_gates,
    weights,
    counts,
    tile_m,
    tile_n,
    tiles_m,
    M,
    S: gl.constexpr,
):
    """A maker's dP, its S where dB is wanted, and dl; announces them."""
    thin: gl.constexpr = product_layout(S.WIDTH, gl.num_warps())
    rows: gl.constexpr = gl.SliceLayout(1, thin)
    dtype: gl.constexpr = p_strip.dtype.element_ty
    o_row = tile_m * S.BLOCK_M + gl.arange(0, S.BLOCK_M, layout=rows)
    o_rank = tile_n * S.WIDTH + gl.arange(0, S.WIDTH, layout=gl.SliceLayout(0, thin))
    o_tall = gl.expand_dims(o_row.to(gl.int64), 1)
    o_flat = gl.expand_dims(o_rank, 0)
    m_row = gl.expand_dims(o_row < M, 1)
    m_low = m_row & (o_flat < S.RANKS)
    b_low = gl.load(p_low + o_tall * S.RANKS + o_flat, mask=m_low, other=0.0).to(gl.float32)
    gate = gl.zeros((S.BLOCK_M, S.WIDTH), gl.float32, layout=thin)
    for e in gl.static_range(S.E):
        if S.GATED:
            mine = gl.load(p_gates + o_row.to(gl.int64) * S.E + e, mask=o_row < M, other=0.0)
        else:
            mine = gl.full([S.BLOCK_M], weights[e], gl.float32, rows)
        gate = owned_gate(gate, mine, o_rank, e, S.EDGES)
    p_block = p_strip + o_tall * S.STRIDE + S.HEAD + o_flat
    gl.store(p_block, (spread * gate).to(dtype), mask=m_low)
    if S.WIDTH_Y > 0:
        p_block = p_gated + o_tall * S.STRIDE_UP + (o_flat - S.UPS[0])
        m_up = m_row & (o_flat >= S.UPS[0]) & (o_flat < S.UPS[1])
        gl.store(p_block, (b_low * gate).to(dtype), mask=m_up)
    complete = True
    if S.GATED:
        products = spread * b_low
        if S.MAKERS > 1:
            slices = counts + FLAGS + tiles_m + S.PIECES + tile_m
            complete = leave_part(products, o_rank, o_row, p_partial, slices, tile_n, M, S)
        if complete:
            store_dlogits(products, o_rank, o_row, p_partial, p_gates, p_strip, M, S)
    if complete:
        publish(counts + FLAGS + tile_m)
        gl.atomic_add(counts + 2, 1, sem="release", scope="gpu")


@gluon.jit
def _store_masked(
    dx, staging, part, b_strip, b_side, p_words, row, column, M, at: gl.constexpr, S: gl.constexpr
):
    """A quarter of a tile, its columns from `at` on: part + mask · dP A + dl G."""
    QUARTER: gl.constexpr = S.BLOCK_N // 4
    lay: gl.constexpr = product_layout(QUARTER, gl.num_warps())
    b_mine = b_side.slice(at, QUARTER, dim=1)
    for s in gl.static_range(0, S.HEAD, 16):
        part = warpgroup_mma(b_strip.slice(s, 16, dim=1), b_mine.slice(s, 16, dim=0), part)
    low = gl.zeros((S.BLOCK_M, QUARTER), gl.float32, layout=lay)
    for s in gl.static_range(S.HEAD, S.BLOCK_S, 16):
        low = warpgroup_mma(b_strip.slice(s, 16, dim=1), b_mine.slice(s, 16, dim=0), low)
    o_row = row + gl.arange(0, S.BLOCK_M, layout=gl.SliceLayout(1, lay))
    words = words_of(p_words, o_row, column + at, M, S.WORDS, QUARTER, lay)
    part += dropped(low, words, QUARTER, lay)
    store_part(dx, staging, part, row, column + at)


@gluon.jit
def _store_dropped(dx, staging, tile, b_strip, b_side, p_words, row, column, M, S: gl.constexpr):
    """tile + mask · dP A + dl G, in quarters."""
    HALF: gl.constexpr = S.BLOCK_N // 2
    QUARTER: gl.constexpr = S.BLOCK_N // 4
    left, right = halves(tile, S.BLOCK_M, S.BLOCK_N)
    for h in gl.static_range(2):
        one, two = halves(left if h == 0 else right, S.BLOCK_M, HALF)
        _store_masked(dx, staging, one, b_strip, b_side, p_words, row, column, M, h * HALF, S)
        _store_masked(
            dx, staging, two, b_strip, b_side, p_words, row, column, M, h * HALF + QUARTER, S
        )


@gluon.jit
def _consume(
    dx,
    ys,
    slots,
    sums,
    ring,
    counts,
    p_strip,
    p_gated,
    p_partial,
    p_shares,
    p_out,
    p_low,
    p_gates,
    p_words,
    weights,
    scaling,
    M,
    tiles_m,
    chunk,
    shares,
    S: gl.constexpr,
):
    PER_SLOT: gl.constexpr = S.BLOCK_K // S.BLOCK_S
    wide: gl.constexpr = product_layout(S.BLOCK_N, gl.num_warps())
    thin: gl.constexpr = product_layout(S.WIDTH, gl.num_warps())
    tiles = tiles_m * S.TILES_N
    slot = 0
    phase = 0
    item = await_item(ring, slot, phase)
    while item < tiles + S.PIECES * shares:
        if item < tiles:
            tile_m, tile_n, makes = place(item, tiles_m, S)
            row = tile_m * S.BLOCK_M
            column = tile_n * S.BLOCK_N
            acc = warpgroup_mma_init(gl.zeros((S.BLOCK_M, S.BLOCK_N), gl.float32, wide))
            last = slot + 0
            if makes:
                spread = warpgroup_mma_init(gl.zeros((S.BLOCK_M, S.WIDTH), gl.float32, thin))
                for n in range(0, S.N, S.BLOCK_K):
                    mbarrier.wait(ring.ready.index(slot), phase)
                    b_dy = slots.xs.index(slot)
                    b_weight = turned(slots.ws.index(slot), S.OUT_MAJOR)
                    spread = warpgroup_mma(b_dy, slots.ns.index(slot), spread, is_async=True)
                    acc = warpgroup_mma(b_dy, b_weight, acc, is_async=True)
                    made, found = warpgroup_mma_wait(2, deps=(spread, acc))
                    spread = warpgroup_mma_init(made)
                    acc = warpgroup_mma_init(found)
                    mbarrier.arrive(ring.empty.index(last), count=1, pred=n > 0)
                    last = slot + 0
                    slot, phase = advance(slot, phase, S.STAGES)
                _make_strip(
                    warpgroup_mma_wait(1, deps=(spread,)), p_strip, p_gated, p_partial, p_low,
                    p_gates, weights, counts, tile_m, tile_n, tiles_m, M, S,
                )  # fmt: skip
            else:
                steps: gl.constexpr = (S.N + S.BLOCK_K - 1) // S.BLOCK_K
                acc, slot, phase, last = multiply(
                    acc, slots.xs, slots.ws, ring, slot, phase, last, False, steps,
                    1, 1, False, S.OUT_MAJOR, S.STAGES,
                )  # fmt: skip
            if S.DROPOUT:
                tile = finish(acc, ring, last)
                mbarrier.wait(ring.ready.index(slot), phase)
                b_strip = slots.ss.index(slot * PER_SLOT)
                b_side = slots.us.index(slot * PER_SLOT)
                _store_dropped(dx, ys, tile, b_strip, b_side, p_words, row, column, M, S)
                mbarrier.arrive(ring.empty.index(slot), count=1)
                slot, phase = advance(slot, phase, S.STAGES)
            else:
                strips: gl.constexpr = (S.SIDE + S.BLOCK_S - 1) // S.BLOCK_S
                acc, slot, phase, last = multiply(
                    acc, slots.ss, slots.us, ring, slot, phase, last, True, strips,
                    PER_SLOT, PER_SLOT, False, False, S.STAGES,
                )  # fmt: skip
                tile = finish(acc, ring, last)
                store_tile(dx, ys, tile, dx, row, column, S.K, S.BLOCK_M, S.BLOCK_N, S.PARTS, False)
        elif S.PIECES > 0:
            piece = (item - tiles) % S.PIECES
            share = (item - tiles) // S.PIECES
            first = share * chunk
            end = min(M, first + chunk)
            arrived = counts + FLAGS + tiles_m + piece
            if piece < S.PIECES_X:
                if S.WIDTH_X > 0:
                    slot, phase = sum_downs(
                        sums.cx, sums.fx, ring, slot, phase, p_shares, arrived, p_out, p_words,
                        M, piece, share, shares, first, end, S,
                    )  # fmt: skip
            else:
                if S.WIDTH_Y > 0:
                    slot, phase = sum_ups(
                        sums.cy, sums.fy, ring, slot, phase, p_shares, arrived,
                        p_out + S.BELOW * S.K, scaling, piece, share, shares, first, end, S,
                    )  # fmt: skip
        item = await_item(ring, slot, phase)
    tma.store_wait(0)
    leave_clean(counts, FLAGS + 2 * tiles_m + S.PIECES)


@gluon.jit(do_not_specialize=["M", "chunk", "shares"])
def _hopper_backward(
    dy,
    weight,
    up,
    strip,
    side,
    x_columns,
    strip_rows,
    dy_columns,
    gated_rows,
    dx,
    made,
    gated,
    partial,
    parts,
    out,
    low,
    gates,
    words,
    counts,
    weights,
    scaling,
    M,
    chunk,
    shares,
    S: gl.constexpr,
):
    """dX [M, K] of dY [M, N], and into `out` dG, dA and dB as `sums.sum_downs` and `sum_ups`.

    `made` is the strip, `gated` S of the ranks whose dB is wanted, `partial` the makers' parts of
    dg, `parts` the shares of the sums over tokens, `chunk` rows each.
    """
    tiles_m = gl.cdiv(M, S.BLOCK_M)
    PER_SLOT: gl.constexpr = S.BLOCK_K // S.BLOCK_S
    TALL: gl.constexpr = S.BLOCK_N if S.OUT_MAJOR else S.BLOCK_K
    LONG: gl.constexpr = S.BLOCK_K if S.OUT_MAJOR else S.BLOCK_N
    dtype: gl.constexpr = dy.dtype
    xs = gl.allocate_shared_memory(dtype, [S.STAGES, S.BLOCK_M, S.BLOCK_K], dy.layout)
    ws = gl.allocate_shared_memory(dtype, [S.STAGES, TALL, LONG], weight.layout)
    ns = gl.allocate_shared_memory(dtype, [S.STAGES, S.BLOCK_K, S.WIDTH], up.layout)
    ys = gl.allocate_shared_memory(dtype, [S.BLOCK_M, S.BLOCK_N // S.PARTS], dx.layout)
    # A step of the strip or of a sum lies where one of dY and W does, at the beginning of its slot.
    ss = xs._reinterpret(dtype, [S.STAGES * PER_SLOT, S.BLOCK_M, S.BLOCK_S], strip.layout)
    us = ws._reinterpret(dtype, [S.STAGES * PER_SLOT, S.BLOCK_S, S.BLOCK_N], side.layout)
    cx = ws
    fx = xs
    cy = ws
    fy = xs
    if S.WIDTH_X > 0:
        count: gl.constexpr = S.STAGES * S.SLOT_N // (S.ROWS_X * S.COLUMNS)
        few: gl.constexpr = S.STAGES * S.SLOT_M // (S.ROWS_X * S.WIDTH_X)
        cx = ws._reinterpret(dtype, [count, S.ROWS_X, S.COLUMNS], x_columns.layout)
        fx = xs._reinterpret(dtype, [few, S.ROWS_X, S.WIDTH_X], strip_rows.layout)
    if S.WIDTH_Y > 0:
        many: gl.constexpr = S.STAGES * S.SLOT_N // (S.ROWS_Y * S.COLUMNS)
        some: gl.constexpr = S.STAGES * S.SLOT_M // (S.ROWS_Y * S.WIDTH_Y)
        cy = ws._reinterpret(dtype, [many, S.ROWS_Y, S.COLUMNS], dy_columns.layout)
        fy = xs._reinterpret(dtype, [some, S.ROWS_Y, S.WIDTH_Y], gated_rows.layout)
    slots = Slots(xs, ws, ns, ss, us)
    sums = Sums(cx, fx, cy, fy)
    ring = make_ring(S.STAGES)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (dx, ys, slots, sums, ring, counts, made, gated, partial, parts, out, low,
                        gates, words, weights, scaling, M, tiles_m, chunk, shares, S)),
            (_produce, (dy, weight, up, strip, side, x_columns, strip_rows, dy_columns, gated_rows,
                        slots, sums, ring, counts, M, tiles_m, chunk, shares, S)),
        ],
        [1],
        [32],
    )  # fmt: skip

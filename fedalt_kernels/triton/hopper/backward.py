"""Backward in one launch: dX, dP, dl, then dA, dG and dB.

As in `forward`, the first items make the strip: T = dY up, and from that, P and the gates dP and dl.
strip [M, SIDE] is [dl's parts | dP], and `side` [SIDE, K] the mixer's rows and A:
dX = dY W + strip · side, the last step of every tile.  Under dropout dP's share of it is made in
quarters of a tile, masked, and added.  The sums over tokens, `sums`, are items too: as many at the
end as fill the last wave of tiles, the others between the tiles before.
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
)

from .blocks import dropped, halves, product_layout, store_part, store_tile, words_of
from .dlogits import leave_part, store_dlogits
from .gates import owned_gate
from .ring import (
    advance,
    await_item,
    contract,
    finish,
    hand_over,
    is_maker,
    is_sum,
    leave_clean,
    make_ring,
    multiply,
    parts_of,
    publish,
    slot_memory,
    take,
    tile_at,
    wait_for,
)
from .sums import produce_sum, sum_downs, sum_ups

# Counters before the row blocks' flags: ticket, left, row blocks announced.
FLAGS = gl.constexpr(3)


class Slots(NamedTuple):
    """Shared memory by slot: of a step of a tile, of its last steps, of a maker's step, of sums."""

    xs: Any  # of dY
    ws: Any  # of W
    ss: Any  # of the strip, where dY is
    us: Any  # of `side`, where W is
    ms: Any  # of dY, where W is
    ns: Any  # of `up`, where dY is
    cx: Any  # of x, where W is
    fx: Any  # of the strip, where dY is
    cy: Any  # of dY, where W is
    fy: Any  # of S, where dY is


@gluon.jit
def _produce_strip(dy_rows, up, slots, ring, slot, phase, row, part, S: gl.constexpr):
    for n in range(0, S.N, S.DEPTH):
        ready = ring.ready.index(slot)
        mbarrier.wait(ring.empty.index(slot), phase)
        mbarrier.expect(ready, (S.BLOCK_M + S.WIDTH) * S.DEPTH * 2)
        tma.async_copy_global_to_shared(dy_rows, [row, n], ready, slots.ms.index(slot))
        block = slots.ns.index(slot * (S.SLOT_M // (S.WIDTH * S.DEPTH)))
        tma.async_copy_global_to_shared(up, [n, part * S.WIDTH], ready, block)
        slot, phase = advance(slot, phase, S.STAGES)
    return slot, phase


@gluon.jit
def _produce_tile(
    dy, weight, strip, side, slots, ring, slot, phase, flag, row, column, S: gl.constexpr
):
    for n in range(0, S.N, S.BLOCK_K):
        ready = ring.ready.index(slot)
        mbarrier.wait(ring.empty.index(slot), phase)
        mbarrier.expect(ready, (S.BLOCK_M + S.BLOCK_N) * S.BLOCK_K * 2)
        tma.async_copy_global_to_shared(dy, [row, n], ready, slots.xs.index(slot))
        if S.OUT_MAJOR:
            tma.async_copy_global_to_shared(weight, [column, n], ready, slots.ws.index(slot))
        else:
            tma.async_copy_global_to_shared(weight, [n, column], ready, slots.ws.index(slot))
        slot, phase = advance(slot, phase, S.STAGES)
    wait_for(flag, S.COUNT)
    for s in range(0, S.SIDE, S.BLOCK_S):
        ready = ring.ready.index(slot)
        mbarrier.wait(ring.empty.index(slot), phase)
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
    dy_rows,
    up,
    strip,
    side,
    x_columns,
    strip_rows,
    dy_columns,
    gated_rows,
    slots,
    ring,
    counts,
    M,
    tiles_m,
    order,
    S: gl.constexpr,
):
    slack, start, gap, early, chunk, shares = order
    makers = tiles_m * S.MAKERS
    others = makers + tiles_m * S.TILES_N
    slot = 0
    phase = 1
    item = take(counts)
    while item < others + S.PIECES * shares:
        hand_over(ring, slot, phase, item)
        sums, index = is_sum(item, others, start, gap, early)
        makes, before = is_maker(index, makers, slack)
        if sums:
            if S.PIECES > 0:
                wait_for(counts + 2, tiles_m * S.COUNT)
                piece = index % S.PIECES
                first = index // S.PIECES * chunk
                end = min(M, first + chunk)
                if piece < S.PIECES_X:
                    if S.WIDTH_X > 0:
                        slot, phase = produce_sum(
                            x_columns, strip_rows, slots.cx, slots.fx, ring, slot, phase,
                            piece * S.COLUMNS, first, end, S.ROWS_X, S.WIDTH_X, S,
                        )  # fmt: skip
                else:
                    if S.WIDTH_Y > 0:
                        slot, phase = produce_sum(
                            dy_columns, gated_rows, slots.cy, slots.fy, ring, slot, phase,
                            (piece - S.PIECES_X) * S.COLUMNS, first, end, S.ROWS_Y, S.WIDTH_Y, S,
                        )  # fmt: skip
        elif makes:
            row = before // S.MAKERS * S.BLOCK_M
            part = before % S.MAKERS
            slot, phase = _produce_strip(dy_rows, up, slots, ring, slot, phase, row, part, S)
        else:
            tile_m, tile_n = tile_at(index - before, tiles_m, S)
            row = tile_m * S.BLOCK_M
            column = tile_n * S.BLOCK_N
            flag = counts + FLAGS + tile_m
            slot, phase = _produce_tile(
                dy, weight, strip, side, slots, ring, slot, phase, flag, row, column, S
            )
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
    part,
    tiles_m,
    M,
    S: gl.constexpr,
):
    """A maker's dP, its S where dB is wanted, and dl; announces them."""
    thin: gl.constexpr = product_layout(S.WIDTH, gl.num_warps())
    rows: gl.constexpr = gl.SliceLayout(1, thin)
    dtype: gl.constexpr = p_strip.dtype.element_ty
    o_row = tile_m * S.BLOCK_M + gl.arange(0, S.BLOCK_M, layout=rows)
    o_rank = part * S.WIDTH + gl.arange(0, S.WIDTH, layout=gl.SliceLayout(0, thin))
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
            complete = leave_part(products, o_rank, o_row, p_partial, slices, part, M, S)
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
    order,
    S: gl.constexpr,
):
    slack, start, gap, early, chunk, shares = order
    makers = tiles_m * S.MAKERS
    others = makers + tiles_m * S.TILES_N
    slot = 0
    phase = 0
    item = await_item(ring, slot, phase)
    while item < others + S.PIECES * shares:
        sums, index = is_sum(item, others, start, gap, early)
        makes, before = is_maker(index, makers, slack)
        if sums:
            if S.PIECES > 0:
                piece = index % S.PIECES
                share = index // S.PIECES
                first = share * chunk
                end = min(M, first + chunk)
                arrived = counts + FLAGS + tiles_m + piece
                if piece < S.PIECES_X:
                    if S.WIDTH_X > 0:
                        slot, phase = sum_downs(
                            slots.cx, slots.fx, ring, slot, phase, p_shares, arrived, p_out,
                            p_words, M, piece, share, shares, first, end, S,
                        )  # fmt: skip
                else:
                    if S.WIDTH_Y > 0:
                        slot, phase = sum_ups(
                            slots.cy, slots.fy, ring, slot, phase, p_shares, arrived,
                            p_out + S.BELOW * S.K, scaling, piece, share, shares, first, end, S,
                        )  # fmt: skip
        elif makes:
            thin: gl.constexpr = product_layout(S.WIDTH, gl.num_warps())
            STEPS: gl.constexpr = (S.N + S.DEPTH - 1) // S.DEPTH
            PER_SLOT: gl.constexpr = S.SLOT_M // (S.WIDTH * S.DEPTH)
            spread = warpgroup_mma_init(gl.zeros((S.BLOCK_M, S.WIDTH), gl.float32, layout=thin))
            spread, slot, phase, last = multiply(
                spread, slots.ms, slots.ns, ring, slot, phase, slot, False, STEPS,
                1, PER_SLOT, False, False, S.STAGES,
            )  # fmt: skip
            _make_strip(
                finish(spread, ring, last), p_strip, p_gated, p_partial, p_low, p_gates, weights,
                counts, before // S.MAKERS, before % S.MAKERS, tiles_m, M, S,
            )  # fmt: skip
        else:
            tile_m, tile_n = tile_at(index - before, tiles_m, S)
            row = tile_m * S.BLOCK_M
            column = tile_n * S.BLOCK_N
            if S.DROPOUT:
                tile, slot, phase = contract(
                    slots, ring, slot, phase, S.N, 0, S.BLOCK_S, S.OUT_MAJOR, False, S
                )
                mbarrier.wait(ring.ready.index(slot), phase)
                at = slot * (S.BLOCK_K // S.BLOCK_S)
                b_strip = slots.ss.index(at)
                b_side = slots.us.index(at)
                _store_dropped(dx, ys, tile, b_strip, b_side, p_words, row, column, M, S)
                mbarrier.arrive(ring.empty.index(slot), count=1)
                slot, phase = advance(slot, phase, S.STAGES)
            else:
                tile, slot, phase = contract(
                    slots, ring, slot, phase, S.N, S.SIDE, S.BLOCK_S, S.OUT_MAJOR, False, S
                )
                store_tile(dx, ys, tile, dx, row, column, S.K, S.BLOCK_M, S.BLOCK_N, S.PARTS, False)
        item = await_item(ring, slot, phase)
    tma.store_wait(0)
    leave_clean(counts, FLAGS + 2 * tiles_m + S.PIECES)


@gluon.jit(do_not_specialize=["M", "slack", "start", "gap", "early", "chunk", "shares"])
def _hopper_backward(
    dy,
    weight,
    dy_rows,
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
    slack,
    start,
    gap,
    early,
    chunk,
    shares,
    S: gl.constexpr,
):
    """dX [M, K] of dY [M, N], and into `out` dG, dA and dB as `sums.sum_downs` and `sum_ups`.

    `made` is the strip, `gated` S of the ranks whose dB is wanted, `partial` the makers' parts of
    dg, `parts` the shares of the sums over tokens, `chunk` rows each; in which order the items
    come say `ring.is_sum` and `is_maker`.
    """
    tiles_m = gl.cdiv(M, S.BLOCK_M)
    xs, ws = slot_memory(dy, weight, S)
    ys = gl.allocate_shared_memory(dx.dtype, [S.BLOCK_M, S.BLOCK_N // S.PARTS], dx.layout)
    ss = parts_of(xs, strip, S.SLOT_M, S.BLOCK_M, S.BLOCK_S, S.STAGES)
    us = parts_of(ws, side, S.SLOT_N, S.BLOCK_S, S.BLOCK_N, S.STAGES)
    ms = parts_of(ws, dy_rows, S.SLOT_N, S.BLOCK_M, S.DEPTH, S.STAGES)
    ns = parts_of(xs, up, S.SLOT_M, S.DEPTH, S.WIDTH, S.STAGES)
    cx = ws
    fx = xs
    cy = ws
    fy = xs
    if S.WIDTH_X > 0:
        cx = parts_of(ws, x_columns, S.SLOT_N, S.ROWS_X, S.COLUMNS, S.STAGES)
        fx = parts_of(xs, strip_rows, S.SLOT_M, S.ROWS_X, S.WIDTH_X, S.STAGES)
    if S.WIDTH_Y > 0:
        cy = parts_of(ws, dy_columns, S.SLOT_N, S.ROWS_Y, S.COLUMNS, S.STAGES)
        fy = parts_of(xs, gated_rows, S.SLOT_M, S.ROWS_Y, S.WIDTH_Y, S.STAGES)
    slots = Slots(xs, ws, ss, us, ms, ns, cx, fx, cy, fy)
    ring = make_ring(S.STAGES)
    fence_async_shared()
    order = (slack, start, gap, early, chunk, shares)
    gl.warp_specialize(
        [
            (_consume, (dx, ys, slots, ring, counts, made, gated, partial, parts, out, low, gates,
                        words, weights, scaling, M, tiles_m, order, S)),
            (_produce, (dy, weight, dy_rows, up, strip, side, x_columns, strip_rows, dy_columns,
                        gated_rows, slots, ring, counts, M, tiles_m, order, S)),
        ],
        [1],
        [32],
    )  # fmt: skip

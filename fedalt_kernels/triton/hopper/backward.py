"""Backward in one launch: dX, dP, dl, then dA, dG and dB.

As in `forward`, the first items make the strip: T = dY up, and from it, P and the gates dP and
dl.
strip [M, SIDE] is [dl's parts | dP], and `side` [SIDE, K] the mixer's rows and A:
dX = dY W + strip · side, the last step of every tile.  Under dropout dP's share of it is made in
pieces of a tile, masked, and added.  The sums over tokens, `sums`, are items too: as many at the
end as fill the last wave of tiles, the others between the tiles before.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_init,
)

from .blocks import product_layout, store_masked, store_tile
from .makers import make_dstrip
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
    wait_for(flag, 2 * S.COUNT)
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
    slack, start, block, early, chunk, shares = order
    makers = tiles_m * S.MAKERS
    others = makers + tiles_m * S.TILES_N
    slot = 0
    phase = 1
    item = take(counts)
    while item < others + S.PIECES * shares:
        hand_over(ring, slot, phase, item)
        sums, index = is_sum(item, others, start, block, early)
        makes, before = is_maker(index, makers, slack)
        if sums:
            if S.PIECES > 0:
                wait_for(counts + 2, 2 * tiles_m * S.COUNT)
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
    half: gl.constexpr,
    S: gl.constexpr,
):
    slack, start, block, early, chunk, shares = order
    makers = tiles_m * S.MAKERS
    others = makers + tiles_m * S.TILES_N
    slot = 0
    phase = 0
    item = await_item(ring, slot, phase)
    while item < others + S.PIECES * shares:
        sums, index = is_sum(item, others, start, block, early)
        makes, before = is_maker(index, makers, slack)
        if sums:
            if S.PIECES > 0:
                piece = index % S.PIECES
                share = index // S.PIECES
                first = share * chunk
                end = min(M, first + chunk)
                arrived = counts + FLAGS + tiles_m + 2 * piece + half
                if piece < S.PIECES_X:
                    if S.WIDTH_X > 0:
                        slot, phase = sum_downs(
                            slots.cx, slots.fx, ring, slot, phase, p_shares, arrived, p_out,
                            p_words, M, piece, share, shares, first, end, half, S,
                        )  # fmt: skip
                else:
                    if S.WIDTH_Y > 0:
                        slot, phase = sum_ups(
                            slots.cy, slots.fy, ring, slot, phase, p_shares, arrived,
                            p_out + S.BELOW * S.K, scaling, piece, share, shares, first, end,
                            half, S,
                        )  # fmt: skip
        elif makes:
            thin: gl.constexpr = product_layout(S.WIDTH, gl.num_warps())
            STEPS: gl.constexpr = (S.N + S.DEPTH - 1) // S.DEPTH
            PER_SLOT: gl.constexpr = S.SLOT_M // (S.WIDTH * S.DEPTH)
            spread = warpgroup_mma_init(gl.zeros((S.HALF_M, S.WIDTH), gl.float32, layout=thin))
            spread, slot, phase, last = multiply(
                spread, slots.ms, slots.ns, ring, slot, phase, slot, False, STEPS,
                half, 1, PER_SLOT, False, False, S.STAGES,
            )  # fmt: skip
            tile_m = before // S.MAKERS
            row = tile_m * S.BLOCK_M + half * S.HALF_M
            slices = counts + FLAGS + tiles_m + 2 * (S.PIECES + tile_m) + half
            make_dstrip(
                finish(spread, ring, last), p_strip, p_gated, p_partial, p_low, p_gates, weights,
                row, before % S.MAKERS, counts + FLAGS + tile_m, slices, counts + 2, M, S,
            )  # fmt: skip
        else:
            tile_m, tile_n = tile_at(index - before, tiles_m, S)
            row = tile_m * S.BLOCK_M + half * S.HALF_M
            column = tile_n * S.BLOCK_N
            if S.DROPOUT:
                tile, slot, phase = contract(
                    slots, ring, slot, phase, half, S.N, 0, S.BLOCK_S, S.OUT_MAJOR, False, S
                )
                mbarrier.wait(ring.ready.index(slot), phase)
                at = slot * (S.BLOCK_K // S.BLOCK_S)
                b_strip = slots.ss.index(at).slice(half * S.HALF_M, S.HALF_M, dim=0)
                b_side = slots.us.index(at)
                store_masked(
                    dx, ys, tile, b_strip, b_side, p_words, row, column, M, 0, S.BLOCK_N, S
                )
                mbarrier.arrive(ring.empty.index(slot), count=1)
                slot, phase = advance(slot, phase, S.STAGES)
            else:
                tile, slot, phase = contract(
                    slots, ring, slot, phase, half, S.N, S.SIDE, S.BLOCK_S, S.OUT_MAJOR, False, S
                )
                store_tile(dx, ys, tile, dx, row, column, 0, S.BLOCK_N, False, S)
        item = await_item(ring, slot, phase)
    tma.store_wait(0)
    leave_clean(counts, FLAGS + 3 * tiles_m + 2 * S.PIECES)


@gluon.jit(do_not_specialize=["M", "slack", "start", "block", "early", "chunk", "shares"])
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
    block,
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
    y0 = gl.allocate_shared_memory(dx.dtype, [2, S.HALF_M, S.PIECE], dx.layout)
    y1 = gl.allocate_shared_memory(dx.dtype, [2, S.HALF_M, S.PIECE], dx.layout)
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
    order = (slack, start, block, early, chunk, shares)
    gl.warp_specialize(
        [
            (_consume, (dx, y0, slots, ring, counts, made, gated, partial, parts, out,
                        low, gates, words, weights, scaling, M, tiles_m, order, 0, S)),
            (_consume, (dx, y1, slots, ring, counts, made, gated, partial, parts, out,
                        low, gates, words, weights, scaling, M, tiles_m, order, 1, S)),
            (_produce, (dy, weight, dy_rows, up, strip, side, x_columns, strip_rows, dy_columns,
                        gated_rows, slots, ring, counts, M, tiles_m, order, S)),
        ],
        [4, 1],
        [232, 32],
    )  # fmt: skip

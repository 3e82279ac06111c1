"""Forward: y, P and the gates in one launch.

The first items make the strip: a row block of x times `side` gives P and the logits, hence gates
and S.  The tiles of y take S · up as the last step of their contraction; the producer waits for a
strip, far ahead of the consumers.
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

from .blocks import dropped, product_layout, store_tile, words_of
from .makers import make_strip
from .ring import (
    advance,
    await_item,
    contract,
    hand_over,
    is_maker,
    leave_clean,
    make_ring,
    parts_of,
    slot_memory,
    take,
    tile_at,
    wait_for,
)

FLAGS = gl.constexpr(2)  # counters before the row blocks' flags: ticket, left


class Slots(NamedTuple):
    """Shared memory by slot: of a step of a tile, of its last steps, and of a maker's step."""

    xs: Any  # of x
    ws: Any  # of W
    ss: Any  # of S, where x is
    us: Any  # of `up`, where W is
    ms: Any  # of x, where W is
    ns: Any  # of `side`, a maker's rows, where x is
    gs: Any  # of `side`, the mixer's rows, where W is, behind x


@gluon.jit
def _produce_strip(x_rows, narrow, router, slots, ring, slot, phase, row, part, S: gl.constexpr):
    BYTES: gl.constexpr = (S.BLOCK_M + S.WIDTH + (S.HEAD if S.ROUTER else 0)) * S.DEPTH * 2
    for k in range(0, S.K, S.DEPTH):
        ready = ring.ready.index(slot)
        mbarrier.wait(ring.empty.index(slot), phase)
        mbarrier.expect(ready, BYTES)
        block = slots.ms.index(slot * (S.SLOT_N // (S.BLOCK_M * S.DEPTH)))
        tma.async_copy_global_to_shared(x_rows, [row, k], ready, block)
        block = slots.ns.index(slot * (S.SLOT_M // (S.WIDTH * S.DEPTH)))
        at = S.HEAD - S.SHIFT + part * S.WIDTH
        tma.async_copy_global_to_shared(narrow, [at, k], ready, block)
        if S.ROUTER:
            block = slots.gs.index((2 * slot + 1) * (S.SLOT_N // 2 // (S.HEAD * S.DEPTH)))
            tma.async_copy_global_to_shared(router, [0, k], ready, block)
        slot, phase = advance(slot, phase, S.STAGES)
    return slot, phase


@gluon.jit
def _produce_tile(
    x, weight, strip, up, slots, ring, slot, phase, flag, row, column, S: gl.constexpr
):
    for k in range(0, S.K, S.BLOCK_K):
        ready = ring.ready.index(slot)
        mbarrier.wait(ring.empty.index(slot), phase)
        mbarrier.expect(ready, (S.BLOCK_M + S.BLOCK_N) * S.BLOCK_K * 2)
        tma.async_copy_global_to_shared(x, [row, k], ready, slots.xs.index(slot))
        if S.OUT_MAJOR:
            tma.async_copy_global_to_shared(weight, [column, k], ready, slots.ws.index(slot))
        else:
            tma.async_copy_global_to_shared(weight, [k, column], ready, slots.ws.index(slot))
        slot, phase = advance(slot, phase, S.STAGES)
    wait_for(flag, 2 * S.MAKERS)
    for rank in range(0, S.RANKS, S.BLOCK_R):
        ready = ring.ready.index(slot)
        mbarrier.wait(ring.empty.index(slot), phase)
        mbarrier.expect(ready, (S.BLOCK_M + S.BLOCK_N) * S.BLOCK_R * 2)
        at = slot * (S.BLOCK_K // S.BLOCK_R)
        tma.async_copy_global_to_shared(strip, [row, rank], ready, slots.ss.index(at))
        tma.async_copy_global_to_shared(up, [column, rank], ready, slots.us.index(at))
        slot, phase = advance(slot, phase, S.STAGES)
    return slot, phase


@gluon.jit
def _produce(
    x,
    weight,
    x_rows,
    narrow,
    router,
    strip,
    up,
    slots,
    ring,
    counts,
    tiles_m,
    slack,
    S: gl.constexpr,
):
    makers = tiles_m * S.MAKERS
    slot = 0
    phase = 1
    item = take(counts)
    while item < makers + tiles_m * S.TILES_N:
        hand_over(ring, slot, phase, item)
        makes, before = is_maker(item, makers, slack)
        if makes:
            row = before // S.MAKERS * S.BLOCK_M
            part = before % S.MAKERS
            slot, phase = _produce_strip(
                x_rows, narrow, router, slots, ring, slot, phase, row, part, S
            )
        else:
            tile_m, tile_n = tile_at(item - before, tiles_m, S)
            row = tile_m * S.BLOCK_M
            column = tile_n * S.BLOCK_N
            flag = counts + FLAGS + tile_m
            slot, phase = _produce_tile(
                x, weight, strip, up, slots, ring, slot, phase, flag, row, column, S
            )
        item = take(counts)
    hand_over(ring, slot, phase, item)
    mbarrier.arrive(ring.ready.index(slot), count=1)


@gluon.jit
def _blocks_of(slots, slot, half: gl.constexpr, S: gl.constexpr):
    """A maker's blocks in a slot: of x, of its rows of `side` and, if ROUTER, of the mixer's."""
    b_x = slots.ms.index(slot * (S.SLOT_N // (S.BLOCK_M * S.DEPTH)))
    b_x = b_x.slice(half * S.HALF_M, S.HALF_M, dim=0)
    b_side = slots.ns.index(slot * (S.SLOT_M // (S.WIDTH * S.DEPTH))).permute((1, 0))
    if S.ROUTER:
        b_router = slots.gs.index((2 * slot + 1) * (S.SLOT_N // 2 // (S.HEAD * S.DEPTH)))
        return b_x, b_side, b_router.permute((1, 0))
    else:
        return b_x, b_side, b_side


@gluon.jit
def _project(slots, ring, slot, phase, half: gl.constexpr, S: gl.constexpr):
    """P and the logits of a half of a row block; the next slot and its phase."""
    thin: gl.constexpr = product_layout(S.WIDTH, gl.num_warps())
    mixer: gl.constexpr = product_layout(S.LOGITS, gl.num_warps())
    low = warpgroup_mma_init(gl.zeros((S.HALF_M, S.WIDTH), gl.float32, layout=thin))
    parts = warpgroup_mma_init(gl.zeros((S.HALF_M, S.LOGITS), gl.float32, layout=mixer))
    last = slot + 0
    for k in range(0, S.K, S.DEPTH):
        mbarrier.wait(ring.ready.index(slot), phase)
        b_x, b_side, b_router = _blocks_of(slots, slot, half, S)
        if S.ROUTER:
            parts = warpgroup_mma(b_x, b_router, parts, is_async=True)
        low = warpgroup_mma(b_x, b_side, low, is_async=True)
        made, found = warpgroup_mma_wait(1 + S.ROUTER, deps=(low, parts))
        low = warpgroup_mma_init(made)
        parts = warpgroup_mma_init(found)
        mbarrier.arrive(ring.empty.index(last), count=1, pred=k > 0)
        last = slot + 0
        slot, phase = advance(slot, phase, S.STAGES)
    b_low, b_parts = warpgroup_mma_wait(0, deps=(low, parts))
    mbarrier.arrive(ring.empty.index(last), count=1)
    return b_low, b_parts, slot, phase


@gluon.jit
def _project_kept(slots, ring, slot, phase, p_words, row, M, half: gl.constexpr, S: gl.constexpr):
    """`_project` under dropout, of rows from `row` on: P of the kept elements, in registers.

    The next block is masked while the products of the one before are under way.
    """
    thin: gl.constexpr = product_layout(S.WIDTH, gl.num_warps())
    mixer: gl.constexpr = product_layout(S.LOGITS, gl.num_warps())
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=thin, k_width=2)
    low = warpgroup_mma_init(gl.zeros((S.HALF_M, S.WIDTH), gl.float32, layout=thin))
    parts = warpgroup_mma_init(gl.zeros((S.HALF_M, S.LOGITS), gl.float32, layout=mixer))
    o_row = row + gl.arange(0, S.HALF_M, layout=gl.SliceLayout(1, left))
    words = words_of(p_words, o_row, 0, M, S.WORDS, S.DEPTH, left)
    mbarrier.wait(ring.ready.index(slot), phase)
    b_x, b_side, b_router = _blocks_of(slots, slot, half, S)
    b_kept = dropped(b_x.load(left), words, S.DEPTH, left)
    words = words_of(p_words, o_row, S.DEPTH, M, S.WORDS, S.DEPTH, left)
    for k in range(S.DEPTH, S.K, S.DEPTH):
        b_x, b_side, b_router = _blocks_of(slots, slot, half, S)
        if S.ROUTER:
            parts = warpgroup_mma(b_x, b_router, parts, is_async=True)
        low = warpgroup_mma(b_kept, b_side, low, is_async=True)
        last = slot + 0
        slot, phase = advance(slot, phase, S.STAGES)
        mbarrier.wait(ring.ready.index(slot), phase)
        b_x, b_side, b_router = _blocks_of(slots, slot, half, S)
        b_next = dropped(b_x.load(left), words, S.DEPTH, left)
        words = words_of(p_words, o_row, k + S.DEPTH, M, S.WORDS, S.DEPTH, left)
        made, found, _ = warpgroup_mma_wait(0, deps=(low, parts, b_kept))
        mbarrier.arrive(ring.empty.index(last), count=1)
        low = warpgroup_mma_init(made)
        parts = warpgroup_mma_init(found)
        b_kept = gl.convert_layout(b_next, left)
    b_x, b_side, b_router = _blocks_of(slots, slot, half, S)
    if S.ROUTER:
        parts = warpgroup_mma(b_x, b_router, parts, is_async=True)
    low = warpgroup_mma(b_kept, b_side, low, is_async=True)
    b_low, b_parts, _ = warpgroup_mma_wait(0, deps=(low, parts, b_kept))
    mbarrier.arrive(ring.empty.index(slot), count=1)
    slot, phase = advance(slot, phase, S.STAGES)
    return b_low, b_parts, slot, phase


@gluon.jit
def _consume(
    y,
    ys,
    slots,
    ring,
    counts,
    p_bias,
    p_gated,
    p_low,
    p_gates,
    p_words,
    weights,
    M,
    tiles_m,
    slack,
    half: gl.constexpr,
    S: gl.constexpr,
):
    makers = tiles_m * S.MAKERS
    slot = 0
    phase = 0
    item = await_item(ring, slot, phase)
    while item < makers + tiles_m * S.TILES_N:
        makes, before = is_maker(item, makers, slack)
        if makes:
            tile_m = before // S.MAKERS
            part = before % S.MAKERS
            row = tile_m * S.BLOCK_M + half * S.HALF_M
            if S.DROPOUT:
                b_low, b_parts, slot, phase = _project_kept(
                    slots, ring, slot, phase, p_words, row, M, half, S
                )
            else:
                b_low, b_parts, slot, phase = _project(slots, ring, slot, phase, half, S)
            logits = b_parts if S.ROUTER else b_low
            flag = counts + FLAGS + tile_m
            make_strip(
                b_low, logits, p_gated, p_low, p_gates, flag, weights, row, part, M, y.dtype, S
            )
        else:
            tile_m, tile_n = tile_at(item - before, tiles_m, S)
            row = tile_m * S.BLOCK_M + half * S.HALF_M
            tile, slot, phase = contract(
                slots, ring, slot, phase, half, S.K, S.RANKS, S.BLOCK_R, S.OUT_MAJOR, True, S
            )
            column = tile_n * S.BLOCK_N
            store_tile(y, ys, tile, p_bias, row, column, 0, S.BLOCK_N, S.BIAS, S)
        item = await_item(ring, slot, phase)
    tma.store_wait(0)
    leave_clean(counts, FLAGS + tiles_m)


@gluon.jit(do_not_specialize=["M", "slack"])
def _hopper(
    x,
    weight,
    x_rows,
    narrow,
    router,
    strip,
    up,
    y,
    bias,
    gated,
    low,
    gates,
    words,
    counts,
    weights,
    M,
    slack,
    S: gl.constexpr,
):
    """y [M, N], P `low` [M, R], S `gated` [M, STRIDE] and `gates` [M, E] of x [M, K]."""
    tiles_m = gl.cdiv(M, S.BLOCK_M)
    xs, ws = slot_memory(x, weight, S)
    y0 = gl.allocate_shared_memory(y.dtype, [2, S.HALF_M, S.PIECE], y.layout)
    y1 = gl.allocate_shared_memory(y.dtype, [2, S.HALF_M, S.PIECE], y.layout)
    ss = parts_of(xs, strip, S.SLOT_M, S.BLOCK_M, S.BLOCK_R, S.STAGES)
    us = parts_of(ws, up, S.SLOT_N, S.BLOCK_N, S.BLOCK_R, S.STAGES)
    ms = parts_of(ws, x_rows, S.SLOT_N, S.BLOCK_M, S.DEPTH, S.STAGES)
    ns = parts_of(xs, narrow, S.SLOT_M, S.WIDTH, S.DEPTH, S.STAGES)
    gs = ns
    if S.ROUTER:
        gs = parts_of(ws, router, S.SLOT_N, S.HEAD, S.DEPTH, S.STAGES)
    slots = Slots(xs, ws, ss, us, ms, ns, gs)
    ring = make_ring(S.STAGES)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (y, y0, slots, ring, counts, bias, gated, low, gates, words,
                        weights, M, tiles_m, slack, 0, S)),
            (_consume, (y, y1, slots, ring, counts, bias, gated, low, gates, words,
                        weights, M, tiles_m, slack, 1, S)),
            (_produce, (x, weight, x_rows, narrow, router, strip, up, slots, ring, counts, tiles_m,
                        slack, S)),
        ],
        [4, 1],
        [232, 32],
    )  # fmt: skip

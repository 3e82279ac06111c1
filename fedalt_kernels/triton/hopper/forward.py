"""Forward: y, P and the gates in one pass over x.

The tiles of y's first columns make the strip: beside x Wᵀ they multiply the block of x that lies in
shared memory with their rows of `side`, and from that come the gates, P and S.  All tiles then take
S · up as the last step of their contraction.  The producer waits for a strip, far ahead of the
consumers.
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
from .gates import owned_gate, peak_logit, powers_of
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

FLAGS = gl.constexpr(2)  # counters before the row blocks' flags: ticket, left


class Slots(NamedTuple):
    """Shared memory by slot."""

    xs: Any  # of x
    ws: Any  # of W
    ns: Any  # of `side`, a maker's rows
    gs: Any  # of `side`, the mixer's rows
    ss: Any  # of S, where x is in other steps
    us: Any  # of `up`, where W is


@gluon.jit
def _produce(x, weight, narrow, router, strip, up, slots, ring, counts, tiles_m, S: gl.constexpr):
    EXTRA: gl.constexpr = S.WIDTH + S.HEAD if S.ROUTER else S.WIDTH
    slot = 0
    phase = 1
    item = take(counts)
    while item < tiles_m * S.TILES_N:
        tile_m, tile_n, makes = place(item, tiles_m, S)
        row = tile_m * S.BLOCK_M
        column = tile_n * S.BLOCK_N
        hand_over(ring, slot, phase, item)
        for k in range(0, S.K, S.BLOCK_K):
            ready = ring.ready.index(slot)
            mbarrier.wait(ring.empty.index(slot), phase)
            if makes:
                mbarrier.expect(ready, (S.BLOCK_M + S.BLOCK_N + EXTRA) * S.BLOCK_K * 2)
                at = S.HEAD - S.SHIFT + tile_n * S.WIDTH
                tma.async_copy_global_to_shared(narrow, [at, k], ready, slots.ns.index(slot))
                if S.ROUTER:
                    tma.async_copy_global_to_shared(router, [0, k], ready, slots.gs.index(slot))
            else:
                mbarrier.expect(ready, (S.BLOCK_M + S.BLOCK_N) * S.BLOCK_K * 2)
            tma.async_copy_global_to_shared(x, [row, k], ready, slots.xs.index(slot))
            if S.OUT_MAJOR:
                tma.async_copy_global_to_shared(weight, [column, k], ready, slots.ws.index(slot))
            else:
                tma.async_copy_global_to_shared(weight, [k, column], ready, slots.ws.index(slot))
            slot, phase = advance(slot, phase, S.STAGES)
        for rank in range(0, S.RANKS, S.BLOCK_R):
            ready = ring.ready.index(slot)
            mbarrier.wait(ring.empty.index(slot), phase)
            if rank == 0:
                wait_for(counts + FLAGS + tile_m, S.MAKERS)
            mbarrier.expect(ready, (S.BLOCK_M + S.BLOCK_N) * S.BLOCK_R * 2)
            at = slot * (S.BLOCK_K // S.BLOCK_R)
            tma.async_copy_global_to_shared(strip, [row, rank], ready, slots.ss.index(at))
            tma.async_copy_global_to_shared(up, [column, rank], ready, slots.us.index(at))
            slot, phase = advance(slot, phase, S.STAGES)
        item = take(counts)
    hand_over(ring, slot, phase, item)
    mbarrier.arrive(ring.ready.index(slot), count=1)


@gluon.jit
def _store_strip(
    b_low,
    logits,
    p_gated,
    p_low,
    p_gates,
    flag,
    weights,
    row,
    tile_n,
    M,
    dtype: gl.constexpr,
    S: gl.constexpr,
):
    """A maker's P, its S, and the gates; announces them."""
    thin: gl.constexpr = product_layout(S.WIDTH, gl.num_warps())
    rows: gl.constexpr = gl.SliceLayout(1, thin)
    o_row = row + gl.arange(0, S.BLOCK_M, layout=rows)
    o_rank = tile_n * S.WIDTH - S.SHIFT + gl.arange(0, S.WIDTH, layout=gl.SliceLayout(0, thin))
    gate = gl.zeros((S.BLOCK_M, S.WIDTH), gl.float32, layout=thin)
    if S.GATED:
        peak = peak_logit(logits, S.E)
        total = powers_of(logits, peak, 0, S.E)
        for e in gl.static_range(1, S.E):
            total += powers_of(logits, peak, e, S.E)
        for e in gl.static_range(S.E):
            mine = gl.convert_layout(powers_of(logits, peak, e, S.E) / total, rows)
            gate = owned_gate(gate, mine, o_rank, e, S.EDGES)
            if tile_n == 0:
                gl.store(p_gates + o_row.to(gl.int64) * S.E + e, mine, mask=o_row < M)
    else:
        for e in gl.static_range(S.E):
            mine = gl.full([S.BLOCK_M], weights[e], gl.float32, rows)
            gate = owned_gate(gate, mine, o_rank, e, S.EDGES)
    inside = gl.expand_dims((o_rank >= 0) & (o_rank < S.RANKS), 0)
    m_low = gl.expand_dims(o_row < M, 1) & inside
    o_tall = gl.expand_dims(o_row.to(gl.int64), 1)
    p_strip = p_gated + o_tall * S.STRIDE + gl.expand_dims(o_rank, 0)
    gl.store(p_strip, (b_low * gate).to(dtype), mask=m_low)
    publish(flag)
    p_block = p_low + o_tall * S.RANKS + gl.expand_dims(o_rank, 0)
    gl.store(p_block, b_low.to(dtype), mask=m_low)


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
    S: gl.constexpr,
):
    PER_SLOT: gl.constexpr = S.BLOCK_K // S.BLOCK_R
    wide: gl.constexpr = product_layout(S.BLOCK_N, gl.num_warps())
    thin: gl.constexpr = product_layout(S.WIDTH, gl.num_warps())
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=thin, k_width=2)
    mixer: gl.constexpr = product_layout(16, gl.num_warps())
    slot = 0
    phase = 0
    item = await_item(ring, slot, phase)
    while item < tiles_m * S.TILES_N:
        tile_m, tile_n, makes = place(item, tiles_m, S)
        row = tile_m * S.BLOCK_M
        acc = warpgroup_mma_init(gl.zeros((S.BLOCK_M, S.BLOCK_N), gl.float32, wide))
        last = slot + 0
        if makes:
            low = warpgroup_mma_init(gl.zeros((S.BLOCK_M, S.WIDTH), gl.float32, thin))
            parts = warpgroup_mma_init(gl.zeros((S.BLOCK_M, S.LOGITS), gl.float32, mixer))
            o_in = row + gl.arange(0, S.BLOCK_M, layout=gl.SliceLayout(1, left))
            for k in range(0, S.K, S.BLOCK_K):
                if S.DROPOUT:
                    words = words_of(p_words, o_in, k, M, S.WORDS, S.BLOCK_K, left)
                mbarrier.wait(ring.ready.index(slot), phase)
                b_x = slots.xs.index(slot)
                b_weight = turned(slots.ws.index(slot), S.OUT_MAJOR)
                b_narrow = slots.ns.index(slot).permute((1, 0))
                if S.ROUTER:
                    b_router = slots.gs.index(slot).permute((1, 0))
                    parts = warpgroup_mma(b_x, b_router, parts, is_async=True)
                if S.DROPOUT:
                    b_kept = dropped(b_x.load(left), words, S.BLOCK_K, left)
                    low = warpgroup_mma(b_kept, b_narrow, low, is_async=True)
                    acc = warpgroup_mma(b_x, b_weight, acc, is_async=True)
                    made, found, sums, _ = warpgroup_mma_wait(1, deps=(low, parts, acc, b_kept))
                else:
                    low = warpgroup_mma(b_x, b_narrow, low, is_async=True)
                    acc = warpgroup_mma(b_x, b_weight, acc, is_async=True)
                    made, found, sums = warpgroup_mma_wait(2 + S.ROUTER, deps=(low, parts, acc))
                low = warpgroup_mma_init(made)
                parts = warpgroup_mma_init(found)
                acc = warpgroup_mma_init(sums)
                mbarrier.arrive(ring.empty.index(last), count=1, pred=k > 0)
                last = slot + 0
                slot, phase = advance(slot, phase, S.STAGES)
            b_low, b_parts = warpgroup_mma_wait(1, deps=(low, parts))
            _store_strip(
                b_low,
                b_parts if S.ROUTER else b_low,
                p_gated,
                p_low,
                p_gates,
                counts + FLAGS + tile_m,
                weights,
                row,
                tile_n,
                M,
                y.dtype,
                S,
            )
        else:
            steps: gl.constexpr = (S.K + S.BLOCK_K - 1) // S.BLOCK_K
            acc, slot, phase, last = multiply(
                acc, slots.xs, slots.ws, ring, slot, phase, last, False, steps,
                1, 1, False, S.OUT_MAJOR, S.STAGES,
            )  # fmt: skip
        ranks: gl.constexpr = (S.RANKS + S.BLOCK_R - 1) // S.BLOCK_R
        acc, slot, phase, last = multiply(
            acc, slots.ss, slots.us, ring, slot, phase, last, True, ranks,
            PER_SLOT, PER_SLOT, False, True, S.STAGES,
        )  # fmt: skip
        tile = finish(acc, ring, last)
        column = tile_n * S.BLOCK_N
        store_tile(y, ys, tile, p_bias, row, column, S.N, S.BLOCK_M, S.BLOCK_N, S.PARTS, S.BIAS)
        item = await_item(ring, slot, phase)
    tma.store_wait(0)
    leave_clean(counts, FLAGS + tiles_m)


@gluon.jit(do_not_specialize=["M"])
def _hopper(
    x,
    weight,
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
    S: gl.constexpr,
):
    """y [M, N], P `low` [M, R], S `gated` [M, STRIDE] and `gates` [M, E] of x [M, K]."""
    tiles_m = gl.cdiv(M, S.BLOCK_M)
    PER_SLOT: gl.constexpr = S.BLOCK_K // S.BLOCK_R
    TALL: gl.constexpr = S.BLOCK_N if S.OUT_MAJOR else S.BLOCK_K
    LONG: gl.constexpr = S.BLOCK_K if S.OUT_MAJOR else S.BLOCK_N
    xs = gl.allocate_shared_memory(x.dtype, [S.STAGES, S.BLOCK_M, S.BLOCK_K], x.layout)
    ws = gl.allocate_shared_memory(x.dtype, [S.STAGES, TALL, LONG], weight.layout)
    ns = gl.allocate_shared_memory(x.dtype, [S.STAGES, S.WIDTH, S.BLOCK_K], narrow.layout)
    gs = ns
    if S.ROUTER:
        gs = gl.allocate_shared_memory(x.dtype, [S.STAGES, S.HEAD, S.BLOCK_K], router.layout)
    ys = gl.allocate_shared_memory(x.dtype, [S.BLOCK_M, S.BLOCK_N // S.PARTS], y.layout)
    # A step of the strip lies where one of x and W does, at the beginning of its slot.
    ss = xs._reinterpret(x.dtype, [S.STAGES * PER_SLOT, S.BLOCK_M, S.BLOCK_R], strip.layout)
    us = ws._reinterpret(x.dtype, [S.STAGES * PER_SLOT, S.BLOCK_N, S.BLOCK_R], up.layout)
    slots = Slots(xs, ws, ns, gs, ss, us)
    ring = make_ring(S.STAGES)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (y, ys, slots, ring, counts, bias, gated, low, gates, words, weights, M,
                        tiles_m, S)),
            (_produce, (x, weight, narrow, router, strip, up, slots, ring, counts, tiles_m, S)),
        ],
        [1],
        [32],
    )  # fmt: skip

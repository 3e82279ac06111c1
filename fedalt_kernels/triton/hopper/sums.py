"""The sums over tokens, dA with dG and dB, as the last items of the backward's launch.

An item is 128 columns of x or of dY and a chunk of the rows: xᵀ [dl | dP], or dYᵀ S.  Programs that
have a tile fewer take more of them.  Whoever makes the last share of a piece adds all of them up,
in their order, and writes the gradient in its parameter's dtype: runs repeat bit for bit.
"""

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

from .blocks import dropped, product_layout, words_of
from .gates import column_of
from .ring import advance, barrier, multiply


@gluon.jit
def produce_sum(
    source,
    factor,
    cs,
    fs,
    ring,
    slot,
    phase,
    column,
    first,
    end,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    S: gl.constexpr,
):
    """Copies the blocks of one item, rows `first` to `end`; returns the next slot and its phase."""
    for row in range(first, end, ROWS):
        ready = ring.ready.index(slot)
        mbarrier.wait(ring.empty.index(slot), phase)
        mbarrier.expect(ready, ROWS * (S.COLUMNS + WIDTH) * 2)
        block = cs.index(slot * (S.SLOT_N // (ROWS * S.COLUMNS)))
        tma.async_copy_global_to_shared(source, [row, column], ready, block)
        block = fs.index(slot * (S.SLOT_M // (ROWS * WIDTH)))
        tma.async_copy_global_to_shared(factor, [row, 0], ready, block)
        slot, phase = advance(slot, phase, S.STAGES)
    return slot, phase


@gluon.jit
def _sum_kept(
    cs,
    fs,
    ring,
    slot,
    phase,
    p_words,
    column,
    first,
    end,
    M,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    S: gl.constexpr,
):
    """xᵀ · factor of the kept elements, and of all of them in the mixer's columns.

    What is not kept becomes zero in shared memory, between the two products.
    """
    lay: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    sums: gl.constexpr = product_layout(WIDTH, gl.num_warps())
    mixer: gl.constexpr = product_layout(S.LOGITS, gl.num_warps())
    acc = warpgroup_mma_init(gl.zeros((S.COLUMNS, WIDTH), gl.float32, layout=sums))
    plain = warpgroup_mma_init(gl.zeros((S.COLUMNS, S.LOGITS), gl.float32, layout=mixer))
    o_row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, lay))
    words = words_of(p_words, o_row, column, M, S.WORDS, S.COLUMNS, lay)
    last = slot + 0
    for row in range(first, end, ROWS):
        mbarrier.wait(ring.ready.index(slot), phase)
        block = cs.index(slot * (S.SLOT_N // (ROWS * S.COLUMNS)))
        b_factor = fs.index(slot * (S.SLOT_M // (ROWS * WIDTH)))
        if S.MIXER:
            b_mixer = b_factor.slice(0, S.HEAD, dim=1)
            plain = warpgroup_mma(block.permute((1, 0)), b_mixer, plain, is_async=True)
        b_kept = dropped(block.load(lay), words, S.COLUMNS, lay)
        o_row += ROWS
        words = words_of(p_words, o_row, column, M, S.WORDS, S.COLUMNS, lay)
        made, found = warpgroup_mma_wait(0, deps=(acc, plain))
        mbarrier.arrive(ring.empty.index(last), count=1, pred=row > first)
        block.store(b_kept)
        fence_async_shared()
        barrier()
        plain = warpgroup_mma_init(found)
        acc = warpgroup_mma(
            block.permute((1, 0)), b_factor, warpgroup_mma_init(made), is_async=True
        )
        last = slot + 0
        slot, phase = advance(slot, phase, S.STAGES)
    total, rest = warpgroup_mma_wait(0, deps=(acc, plain))
    mbarrier.arrive(ring.empty.index(last), count=1)
    return total, rest, slot, phase


@gluon.jit
def _sum(
    cs,
    fs,
    ring,
    slot,
    phase,
    steps,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    S: gl.constexpr,
):
    """sourceᵀ · factor [128, WIDTH] over the next slots, and the next slot and its phase."""
    sums: gl.constexpr = product_layout(WIDTH, gl.num_warps())
    acc = warpgroup_mma_init(gl.zeros((S.COLUMNS, WIDTH), gl.float32, layout=sums))
    PER_C: gl.constexpr = S.SLOT_N // (ROWS * S.COLUMNS)
    PER_F: gl.constexpr = S.SLOT_M // (ROWS * WIDTH)
    acc, slot, phase, last = multiply(
        acc, cs, fs, ring, slot, phase, slot, False, steps, PER_C, PER_F, True, False, S.STAGES
    )
    total = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(ring.empty.index(last), count=1)
    return total, slot, phase


@gluon.jit
def _add_shares(
    total, plain, p_shares, arrived, share, shares, HEAD: gl.constexpr, S: gl.constexpr
):
    """Keeps this share of a piece, whose first HEAD columns are `plain`.  The last to arrive adds
    all up in their order: returns the sum, and whether it is complete."""
    lay: gl.constexpr = total.type.layout
    SIZE: gl.constexpr = S.PIECES * S.COLUMNS * S.MOST
    o_column = gl.expand_dims(gl.arange(0, S.COLUMNS, layout=gl.SliceLayout(1, lay)), 1)
    o_width = gl.expand_dims(gl.arange(0, total.shape[1], layout=gl.SliceLayout(0, lay)), 0)
    o_share = o_column * S.MOST + o_width
    p_mine = p_shares + share * SIZE
    gl.store(p_mine + o_share, total, mask=o_width >= HEAD)
    if HEAD > 0:
        thin: gl.constexpr = plain.type.layout
        o_high = gl.expand_dims(gl.arange(0, S.COLUMNS, layout=gl.SliceLayout(1, thin)), 1)
        o_head = gl.expand_dims(gl.arange(0, HEAD, layout=gl.SliceLayout(0, thin)), 0)
        gl.store(p_mine + o_high * S.MOST + o_head, plain)
    barrier()
    complete = gl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == shares - 1
    if complete:
        total = gl.zeros(total.shape, gl.float32, layout=lay)
        for i in range(shares):
            total += gl.load(p_shares + i * SIZE + o_share)
    return total, complete


@gluon.jit
def sum_downs(
    cs,
    fs,
    ring,
    slot,
    phase,
    p_shares,
    arrived,
    p_out,
    p_words,
    M,
    piece,
    share,
    shares,
    first,
    end,
    S: gl.constexpr,
):
    """One item of x.  Into out: if MIXER dG [E, K], then dA of the wanted ranks, [ranks, K].

    Returns the next slot and its phase.
    """
    column = piece * S.COLUMNS
    p_piece = p_shares + piece * (S.COLUMNS * S.MOST)
    if S.DROPOUT:
        total, plain, slot, phase = _sum_kept(
            cs, fs, ring, slot, phase, p_words, column, first, end, M, S.ROWS_X, S.WIDTH_X, S
        )
        MIXED: gl.constexpr = S.HEAD if S.MIXER else 0
        total, complete = _add_shares(total, plain, p_piece, arrived, share, shares, MIXED, S)
    else:
        steps = gl.cdiv(end - first, S.ROWS_X)
        total, slot, phase = _sum(cs, fs, ring, slot, phase, steps, S.ROWS_X, S.WIDTH_X, S)
        total, complete = _add_shares(total, total, p_piece, arrived, share, shares, 0, S)
    if complete:
        lay: gl.constexpr = total.type.layout
        dtype: gl.constexpr = p_out.dtype.element_ty
        ABOVE: gl.constexpr = S.E if S.MIXER else 0
        o_column = column + gl.arange(0, S.COLUMNS, layout=gl.SliceLayout(1, lay))
        o_rank = gl.arange(0, S.WIDTH_X, layout=gl.SliceLayout(0, lay)) - S.HEAD
        wanted = gl.expand_dims((o_rank >= S.DOWNS[0]) & (o_rank < S.DOWNS[1]), 0)
        m_down = gl.expand_dims(o_column < S.K, 1) & wanted
        o_row = gl.expand_dims(o_rank - S.DOWNS[0] + ABOVE, 0)
        gl.store(p_out + o_row * S.K + gl.expand_dims(o_column, 1), total.to(dtype), mask=m_down)
        for e in gl.static_range(ABOVE):
            mine = column_of(total, e, S.E + e)
            gl.store(p_out + e * S.K + o_column, mine.to(dtype), mask=o_column < S.K)
    return slot, phase


@gluon.jit
def sum_ups(
    cs,
    fs,
    ring,
    slot,
    phase,
    p_shares,
    arrived,
    p_out,
    scaling,
    piece,
    share,
    shares,
    first,
    end,
    S: gl.constexpr,
):
    """One item of dY.  Into out: s · dB_e [N, r_e] of one adapter after the other of the wanted
    ranks.  Returns the next slot and its phase."""
    steps = gl.cdiv(end - first, S.ROWS_Y)
    p_piece = p_shares + piece * (S.COLUMNS * S.MOST)
    total, slot, phase = _sum(cs, fs, ring, slot, phase, steps, S.ROWS_Y, S.WIDTH_Y, S)
    total, complete = _add_shares(total, total, p_piece, arrived, share, shares, 0, S)
    if complete:
        lay: gl.constexpr = total.type.layout
        column = (piece - S.PIECES_X) * S.COLUMNS
        o_n = gl.expand_dims(column + gl.arange(0, S.COLUMNS, layout=gl.SliceLayout(1, lay)), 1)
        o_rank = S.UPS[0] + gl.arange(0, S.WIDTH_Y, layout=gl.SliceLayout(0, lay))
        o_rank = gl.expand_dims(o_rank, 0)
        place = o_n * 0 + o_rank * 0
        for e in gl.static_range(S.E):
            if S.EDGES[e] >= S.UPS[0] and S.EDGES[e] < S.UPS[1]:
                mine = o_n * (S.EDGES[e + 1] - S.EDGES[e]) + o_rank
                mine += S.N * (S.EDGES[e] - S.UPS[0]) - S.EDGES[e]
                owned = (o_rank >= S.EDGES[e]) & (o_rank < S.EDGES[e + 1])
                place = gl.where(owned, mine, place)
        m_up = (o_n < S.N) & (o_rank < S.UPS[1])
        gl.store(p_out + place, (total * scaling).to(p_out.dtype.element_ty), mask=m_up)
    return slot, phase

"""Blocks in registers: their layouts, the mask's bits, and how a tile is copied out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
)


@gluon.constexpr_function
def product_layout(width, warps):
    """Of a product of `width` columns, at most 256 of them by one instruction."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, min(width, 256), 16]
    )


@gluon.jit
def words_of(
    p_words, o_row, column, M, WORDS: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr
):
    """The mask's word of each element, [rows, WIDTH] from `column` on, a multiple of 32."""
    o_column = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT)), 0)
    p_row = p_words + o_row.to(gl.int64) * WORDS + column // 32
    words = o_column * 0
    for i in gl.static_range(WIDTH // 32):
        m_word = (o_row < M) & (column // 32 + i < WORDS)
        word = gl.expand_dims(gl.load(p_row + i, mask=m_word, other=0), 1)
        words = gl.where(o_column >= 32 * i, word, words)
    return words


@gluon.jit
def dropped(block, words, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """A block with zeros for what the mask's words do not keep."""
    o_bit = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT)), 0) % 32
    return gl.where(((words >> o_bit) & 1) != 0, block, 0.0).to(block.dtype)


@gluon.constexpr_function
def pairs_layout(layout):
    """Of [rows, 64] in a blocked layout, as [rows, 2, 32]."""
    rows, columns = layout.size_per_thread
    high, wide = layout.threads_per_warp
    return gl.BlockedLayout(
        [rows, 1, columns], [high, 2, wide // 2], [*layout.warps_per_cta, 1], [2, 1, 0]
    )


@gluon.jit
def word_pairs(p_words, row, column, M, ROWS: gl.constexpr, WORDS: gl.constexpr,
               LAYOUT: gl.constexpr):  # fmt: skip
    """The mask's two words of each of ROWS rows, for 64 columns from `column` on."""
    lay: gl.constexpr = gl.SliceLayout(2, pairs_layout(LAYOUT))
    o_row = gl.expand_dims(row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, lay)), 1)
    o_word = gl.expand_dims(column // 32 + gl.arange(0, 2, layout=gl.SliceLayout(0, lay)), 0)
    p_word = p_words + o_row.to(gl.int64) * WORDS + o_word
    return gl.load(p_word, mask=(o_row < M) & (o_word < WORDS), other=0)


@gluon.jit
def dropped_pairs(block, words, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """`dropped` for a block [ROWS, 64] and its `word_pairs`."""
    pairs: gl.constexpr = pairs_layout(LAYOUT)
    parts = gl.convert_layout(gl.reshape(block, [ROWS, 2, 32]), pairs)
    o_bit = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(0, pairs)))
    o_bit = gl.expand_dims(gl.expand_dims(o_bit, 0), 0)
    kept = ((gl.expand_dims(words, 2) >> o_bit) & 1) != 0
    parts = gl.where(kept, parts, 0.0).to(block.dtype)
    return gl.convert_layout(gl.reshape(parts, [ROWS, 64]), LAYOUT)


@gluon.jit
def halves(block, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
    """The left and the right half of a block, in a product's layout."""
    half: gl.constexpr = product_layout(WIDTH // 2, gl.num_warps())
    parts = gl.permute(gl.reshape(block, [HEIGHT, 2, WIDTH // 2]), [0, 2, 1])
    left, right = gl.split(parts)
    return gl.convert_layout(left, half), gl.convert_layout(right, half)


@gluon.jit
def with_bias(block, bias, column, WIDTH: gl.constexpr, BIAS: gl.constexpr, S: gl.constexpr):
    if BIAS:
        lay: gl.constexpr = gl.SliceLayout(0, product_layout(WIDTH, gl.num_warps()))
        o_n = column + gl.arange(0, WIDTH, layout=lay)
        b_bias = gl.load(bias + o_n, mask=o_n < S.N, other=0.0).to(gl.float32)
        return block + gl.expand_dims(b_bias, 0)
    else:
        return block


@gluon.jit
def store_part(target, staging, block, row, column):
    """Has a block copied out through shared memory, while the copy before it is under way."""
    tma.store_wait(1)
    staging.store(block.to(target.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(target, [row, column], staging)


@gluon.jit
def store_tile(
    target,
    staging,
    block,
    bias,
    row,
    column,
    at: gl.constexpr,
    WIDTH: gl.constexpr,
    BIAS: gl.constexpr,
    S: gl.constexpr,
):
    """Copies out WIDTH columns of a tile from `at` on, plus bias, in pieces that take turns in two
    buffers."""
    if WIDTH == S.PIECE:
        block = with_bias(block, bias, column + at, WIDTH, BIAS, S)
        store_part(target, staging.index(at // WIDTH % 2), block, row, column + at)
    else:
        HALF: gl.constexpr = WIDTH // 2
        left, right = halves(block, S.HALF_M, WIDTH)
        store_tile(target, staging, left, bias, row, column, at, HALF, BIAS, S)
        store_tile(target, staging, right, bias, row, column, at + HALF, HALF, BIAS, S)


@gluon.jit
def store_masked(
    dx,
    staging,
    block,
    b_strip,
    b_side,
    p_words,
    row,
    column,
    M,
    at: gl.constexpr,
    WIDTH: gl.constexpr,
    S: gl.constexpr,
):
    """As `store_tile`, of block + mask · dP A + dl G."""
    if WIDTH == S.PIECE:
        lay: gl.constexpr = product_layout(WIDTH, gl.num_warps())
        b_mine = b_side.slice(at, WIDTH, dim=1)
        rest = gl.zeros((S.HALF_M, WIDTH), gl.float32, layout=lay)  # of dl G, which has no mask
        for s in gl.static_range(0, S.HEAD, 16):
            rest = warpgroup_mma(b_strip.slice(s, 16, dim=1), b_mine.slice(s, 16, dim=0), rest)
        low = gl.zeros((S.HALF_M, WIDTH), gl.float32, layout=lay)
        for s in gl.static_range(S.HEAD, S.BLOCK_S, 16):
            low = warpgroup_mma(b_strip.slice(s, 16, dim=1), b_mine.slice(s, 16, dim=0), low)
        o_row = row + gl.arange(0, S.HALF_M, layout=gl.SliceLayout(1, lay))
        words = words_of(p_words, o_row, column + at, M, S.WORDS, WIDTH, lay)
        block += rest + dropped(low, words, WIDTH, lay)
        store_part(dx, staging.index(at // WIDTH % 2), block, row, column + at)
    else:
        HALF: gl.constexpr = WIDTH // 2
        left, right = halves(block, S.HALF_M, WIDTH)
        store_masked(dx, staging, left, b_strip, b_side, p_words, row, column, M, at, HALF, S)
        store_masked(
            dx, staging, right, b_strip, b_side, p_words, row, column, M, at + HALF, HALF, S
        )

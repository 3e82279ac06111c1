"""Blocks in registers: their layouts, the mask's bits, and how a tile is copied out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma


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


@gluon.jit
def halves(block, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
    """The left and the right half of a block, in a product's layout."""
    half: gl.constexpr = product_layout(WIDTH // 2, gl.num_warps())
    parts = gl.permute(gl.reshape(block, [HEIGHT, 2, WIDTH // 2]), [0, 2, 1])
    left, right = gl.split(parts)
    return gl.convert_layout(left, half), gl.convert_layout(right, half)


@gluon.jit
def with_bias(block, bias, column, N: gl.constexpr, WIDTH: gl.constexpr, BIAS: gl.constexpr):
    if BIAS:
        lay: gl.constexpr = gl.SliceLayout(0, product_layout(WIDTH, gl.num_warps()))
        o_n = column + gl.arange(0, WIDTH, layout=lay)
        b_bias = gl.load(bias + o_n, mask=o_n < N, other=0.0).to(gl.float32)
        return block + gl.expand_dims(b_bias, 0)
    else:
        return block


@gluon.jit
def store_part(target, staging, block, row, column):
    """Has a block copied out through shared memory."""
    tma.store_wait(0)
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
    N: gl.constexpr,
    HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr,
    PARTS: gl.constexpr,
    BIAS: gl.constexpr,
):
    """Copies out a tile, plus bias [N], in PARTS (1, 2 or 4) side by side."""
    if PARTS == 1:
        block = with_bias(block, bias, column, N, WIDTH, BIAS)
        store_part(target, staging, block, row, column)
    else:
        HALF: gl.constexpr = WIDTH // 2
        FEWER: gl.constexpr = PARTS // 2
        left, right = halves(block, HEIGHT, WIDTH)
        store_tile(target, staging, left, bias, row, column, N, HEIGHT, HALF, FEWER, BIAS)
        store_tile(target, staging, right, bias, row, column + HALF, N, HEIGHT, HALF, FEWER, BIAS)

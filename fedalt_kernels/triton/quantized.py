"""How kernels read a quantized weight, see `fedalt_kernels.quantized` for its storage.

A weight of 4 bits is read with its statistics, which decode to float32 here: as float32 in memory,
nested ones would take four times the space that nesting has left them.
"""

import triton
import triton.language as tl

from .primitives import load_block, rounded


@triton.jit
def look_up(octets, code):
    """Both values of every byte [h, w], the high nibble's first: [h, 2 w] from a code [16]."""
    HEIGHT: tl.constexpr = octets.shape[0]
    WIDTH: tl.constexpr = octets.shape[1]
    octets = octets.to(tl.int32)
    nibbles = tl.reshape(tl.join(octets >> 4, octets & 15), (HEIGHT * WIDTH * 2,))
    values = tl.gather(tl.load(code + tl.arange(0, 16)), nibbles, 0)
    return tl.reshape(values, (HEIGHT, WIDTH * 2))


@triton.jit
def load_octets(
    data,
    row,
    column,
    N: tl.constexpr,
    K: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[HEIGHT, WIDTH] of 8-bit rows [N, K] at (row, column) in float32; fp8 comes as uint8."""
    octets = load_block(data, row, column, N, K, K, HEIGHT, WIDTH, EVEN, False)
    if octets.dtype == tl.uint8:
        octets = octets.to(tl.float8e4nv, bitcast=True)
    return octets.to(tl.float32)


@triton.jit
def load_absmax(statistics, o_block, m_block, BLOCKS: tl.constexpr):
    """absmax of these blocks, in float32."""
    absmax = tl.load(statistics[0] + o_block, mask=m_block, other=0)
    if len(BLOCKS) == 2:
        nested = tl.load(statistics[2] + o_block // BLOCKS[1], mask=m_block, other=0.0)
        absmax = tl.load(statistics[3] + absmax.to(tl.int32)) * nested + tl.load(statistics[4])
    return absmax


@triton.jit
def load_quantized(
    data,
    statistics,
    row,
    column,
    N: tl.constexpr,
    K: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[HEIGHT, WIDTH] of W [N, K] at (row, column), a multiple of WIDTH; unscaled if by rows.

    Blocks do not cross rows, and WIDTH is a multiple of a block or divides one.
    """
    EVEN: tl.constexpr = N % HEIGHT == 0 and K % WIDTH == 0
    if len(BLOCKS) == 0:
        values = load_octets(data, row, column, N, K, HEIGHT, WIDTH, EVEN)
        return rounded(values, dtype, PRECISION)
    else:
        HALF: tl.constexpr = K // 2
        BLOCK: tl.constexpr = BLOCKS[0]
        octets = load_block(data, row, column // 2, N, HALF, HALF, HEIGHT, WIDTH // 2, EVEN, False)
        values = look_up(octets, statistics[1])
        # Blocks of this tile: [HEIGHT, GROUPS], each for INSIDE of its columns.
        GROUPS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
        INSIDE: tl.constexpr = WIDTH // GROUPS
        o_row = (row + tl.arange(0, HEIGHT))[:, None]
        o_group = (column // BLOCK + tl.arange(0, GROUPS))[None, :]
        m_block = (o_row < N) & (o_group < K // BLOCK)
        absmax = load_absmax(statistics, o_row * (K // BLOCK) + o_group, m_block, BLOCKS)
        values = tl.reshape(values, (HEIGHT, GROUPS, INSIDE)) * absmax[:, :, None]
        return rounded(tl.reshape(values, (HEIGHT, WIDTH)), dtype, PRECISION)

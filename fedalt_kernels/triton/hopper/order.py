"""In which order a launch's items come, by what they cost.

Costs are in tiles of 128 by 256, which the tensor cores take about K / 92 ns for.  A wave is a tile
on every program.  What the last wave leaves free is given to the strip's makers, in the first wave,
and to the sums over tokens.
"""

import triton

from .shapes import BLOCK_M, COLUMNS, GROUP_M, Backward, Forward

CHUNK = 2048  # rows of an item of the sums over tokens
COPIED = 90_000  # bytes that one program copies in a microsecond
MULTIPLIED = 5_900_000  # multiplications and additions in a microsecond


def tile_us(length: int) -> float:
    """A tile's microseconds, over a contraction of this length."""
    return 2 * BLOCK_M * 256 * length / MULTIPLIED


def maker_us(length: int, width: int) -> float:
    """A maker's, which reads a row block and `width` rows of the other factor."""
    return 2 * length * (BLOCK_M + width) / COPIED


def slack_of(m: int, programs: int, shape: Forward | Backward) -> int:
    """How many makers come first, see `ring.is_maker`: all, or as many as programs that have a tile
    fewer than others, where these have the time to take all of them."""
    rows = triton.cdiv(m, BLOCK_M)
    makers, tiles = rows * shape.MAKERS, rows * shape.TILES_N
    free = -tiles % programs
    length = shape.K if isinstance(shape, Forward) else shape.N
    needed_first = min(rows, GROUP_M * triton.cdiv(programs - free, GROUP_M * shape.TILES_N))
    if not 0 < free < makers or free // shape.MAKERS < needed_first:
        return makers
    rounds = triton.cdiv(makers, free)
    fits = rounds * maker_us(length, shape.WIDTH) < tile_us(length)
    return free if fits and tiles > programs else makers


def order_of(m: int, programs: int, shape: Backward) -> dict[str, int]:
    """The runtime numbers of `backward`, see `ring.is_sum`."""
    rows = triton.cdiv(m, BLOCK_M)
    makers, tiles = rows * shape.MAKERS, rows * shape.TILES_N
    shares = triton.cdiv(m, CHUNK)
    slack = slack_of(m, programs, shape)
    sums, start = shape.PIECES * shares, programs + makers  # behind all makers
    free_us = (-tiles % programs) * tile_us(shape.N) - makers * maker_us(shape.N, shape.WIDTH)
    sum_us = 2 * min(m, CHUNK) * (COLUMNS + shape.MOST) / COPIED
    late = max(programs, int(free_us / sum_us))  # that fill the last wave
    room = makers + tiles - start
    early = max(0, min(sums - late, room))
    gap = room // early if early else 1
    return dict(slack=slack, start=start, gap=gap, early=early, chunk=CHUNK, shares=shares)

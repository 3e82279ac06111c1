"""Sizes and flags of Hopper's kernels, all known when a kernel is compiled.

`side` [HEAD + R, K] holds the mixer's rows, see `gates`, and A of all adapters below them.
"""

from dataclasses import dataclass
from typing import Any

import triton
from triton.language import constexpr

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
GROUP_M = 8
COLUMNS = 128  # of x or dY in an item of the sums over tokens
SLOT_M, SLOT_N = BLOCK_M * BLOCK_K, BLOCK_N * BLOCK_K  # elements of a slot's two parts
STAGES = 4
WIDEST = 64  # columns of a step of the strip
MOST_RANKS = 256
MOST_SUMMED = 256  # columns of a sum over tokens


def columns(count: int) -> int:
    """As many columns as a block of `count` has: a power of two, of at least 16."""
    return max(16, triton.next_power_of_2(count))


def head_of(adapters: int, gated: bool) -> int:
    """Rows of `side` before those of A."""
    return columns(3 * adapters) if gated else 0


def rounded_up(count: int, unit: int = 8) -> int:
    """The stride of rows of `count` elements, of which TMA wants a multiple of 16 bytes."""
    return -(-count // unit) * unit


class Constants:
    """A shape as kernels take it, every attribute a constexpr."""

    def __init__(self, shape: "Shape") -> None:
        self._shape = shape

    def __getattr__(self, name: str) -> Any:
        return constexpr(getattr(self._shape, name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self._shape == other._shape

    def __hash__(self) -> int:
        return hash(self._shape)

    def __repr__(self) -> str:
        return repr(self._shape)


@dataclass(frozen=True)
class Shape:
    """What both directions have: a product's sizes, and the adapters beside it."""

    N: int
    K: int
    EDGES: tuple[int, ...]  # where each adapter's ranks begin, and where the last one's end
    GATED: bool  # there is a mixer; else fixed gates

    BLOCK_M = BLOCK_M
    HALF_M = BLOCK_M // 2  # rows of one of the two consumers
    BLOCK_N = BLOCK_N
    BLOCK_K = BLOCK_K
    GROUP_M = GROUP_M
    STAGES = STAGES
    SLOT_M = SLOT_M
    SLOT_N = SLOT_N

    @property
    def E(self) -> int:
        return len(self.EDGES) - 1

    @property
    def RANKS(self) -> int:
        return self.EDGES[-1]

    @property
    def HEAD(self) -> int:
        """The mixer's rows of `side`."""
        return head_of(self.E, self.GATED)

    @property
    def LOGITS(self) -> int:
        """Columns of a product with them."""
        return max(16, self.HEAD)

    @property
    def WORDS(self) -> int:
        """Words of a row of the mask."""
        return triton.cdiv(self.K, 32)


@dataclass(frozen=True)
class Forward(Shape):
    """Of `forward`: y [M, N] of x [M, K]."""

    BIAS: bool
    DROPOUT: bool
    OUT_MAJOR: bool  # W is stored as [N, K]

    PIECE = BLOCK_N // 4  # columns of a tile that are stored at a time

    @property
    def TILES_N(self) -> int:
        return triton.cdiv(self.N, BLOCK_N)

    @property
    def JOINED(self) -> bool:
        """Whether a maker's block holds the mixer's rows and all ranks; else it holds ranks alone,
        and the mixer's rows are multiplied apart from them."""
        return self.GATED and not self.DROPOUT and self.HEAD + self.RANKS <= WIDEST

    @property
    def ROUTER(self) -> bool:
        return self.GATED and not self.JOINED

    @property
    def SHIFT(self) -> int:
        """The first rank's column in a maker's block."""
        return self.HEAD if self.JOINED else 0

    @property
    def WIDTH(self) -> int:
        """Columns of a maker's block."""
        return min(2 * WIDEST, columns(self.SHIFT + self.RANKS))

    @property
    def MAKERS(self) -> int:
        """Items that make the strip of a row block, each of WIDTH ranks."""
        return 1 if self.JOINED else triton.cdiv(self.RANKS, self.WIDTH)

    @property
    def DEPTH(self) -> int:
        """Columns of x in a maker's step: what fits into a slot beside its rows of `side`."""
        return 64 if self.ROUTER or self.WIDTH > WIDEST else 128

    @property
    def BLOCK_R(self) -> int:
        """Ranks of a step of the strip."""
        return min(WIDEST, columns(self.RANKS))

    @property
    def STRIDE(self) -> int:
        """Of S and `up`."""
        return rounded_up(self.RANKS)


@dataclass(frozen=True)
class Backward(Shape):
    """Of `backward`: dX [M, K] of dY [M, N], and the sums over tokens that are wanted."""

    MIXER: bool  # dG is wanted
    DOWNS: tuple[int, int]  # first and end of the ranks whose dA is; (0, 0) for none
    UPS: tuple[int, int]  # likewise dB
    DROPOUT: bool
    OUT_MAJOR: bool  # the rows of W as it is stored are dX's columns

    COLUMNS = COLUMNS
    HALF_COLUMNS = COLUMNS // 2

    @property
    def PIECE(self) -> int:
        """Columns of a tile that are stored at a time; of a masked one a word of the mask's."""
        return 32 if self.DROPOUT else BLOCK_N // 4

    @property
    def SIDE(self) -> int:
        """Columns of the strip."""
        return self.HEAD + self.RANKS

    @property
    def TILES_N(self) -> int:
        return triton.cdiv(self.K, BLOCK_N)

    @property
    def WIDTH(self) -> int:
        """Ranks of a maker."""
        return min(WIDEST, columns(self.RANKS))

    @property
    def MAKERS(self) -> int:
        """Items that make the strip of a row block."""
        return triton.cdiv(self.RANKS, self.WIDTH)

    @property
    def DEPTH(self) -> int:
        """Columns of dY in a maker's step."""
        return SLOT_N // BLOCK_M

    @property
    def COUNT(self) -> int:
        """How often a row block is announced."""
        return 1 if self.GATED else self.MAKERS

    @property
    def BLOCK_S(self) -> int:
        """Columns of a step of the strip."""
        return min(WIDEST, columns(self.SIDE))

    @property
    def STRIDE(self) -> int:
        """Of the strip."""
        return rounded_up(self.SIDE)

    @property
    def STRIDE_UP(self) -> int:
        """Of S, of the ranks whose dB is wanted."""
        return rounded_up(max(1, self.UPS[1] - self.UPS[0]))

    @property
    def WIDTH_X(self) -> int:
        """Columns of the strip in a sum over x: all up to the last one wanted; 0 for no sum."""
        return columns(self.HEAD + self.DOWNS[1]) if self.MIXER or self.DOWNS[1] else 0

    @property
    def WIDTH_Y(self) -> int:
        return columns(self.UPS[1] - self.UPS[0]) if self.UPS[1] else 0

    @property
    def ROWS_X(self) -> int:
        """Rows of a step of a sum over x, whose columns of the strip fill at most a slot's part."""
        return min(SLOT_N // COLUMNS, SLOT_M // max(1, self.WIDTH_X))

    @property
    def ROWS_Y(self) -> int:
        return min(SLOT_N // COLUMNS, SLOT_M // max(1, self.WIDTH_Y))

    @property
    def PIECES_X(self) -> int:
        return triton.cdiv(self.K, COLUMNS) if self.WIDTH_X else 0

    @property
    def PIECES(self) -> int:
        """Sums over tokens, each of 128 columns of x or of dY."""
        return self.PIECES_X + (triton.cdiv(self.N, COLUMNS) if self.WIDTH_Y else 0)

    @property
    def MOST(self) -> int:
        return max(self.WIDTH_X, self.WIDTH_Y)

    @property
    def BELOW(self) -> int:
        """Rows [K] of `out` before dB: dG and dA."""
        return self.E * self.MIXER + self.DOWNS[1] - self.DOWNS[0]

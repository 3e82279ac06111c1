"""The order of a launch's items: everything once, and nothing before what it waits for."""

from types import SimpleNamespace

import pytest

from fedalt_kernels.triton.hopper import order
from fedalt_kernels.triton.hopper.shapes import BLOCK_M, Backward

from . import machine

SHAPES = [
    (8192, 4096, 4096, 8, 132),
    (8192, 1024, 4096, 8, 132),
    (8192, 11008, 4096, 8, 132),
    (8192, 4096, 11008, 64, 132),
    (2048, 4096, 4096, 8, 132),
    (200, 328, 264, 8, 5),
    (128, 8, 8, 1, 132),
    (70000, 512, 512, 100, 7),
]


@pytest.mark.parametrize(("m", "n", "k", "rank", "programs"), SHAPES)
def test_everything_once_and_in_time(m: int, n: int, k: int, rank: int, programs: int) -> None:
    edges, wanted = (0, rank, 2 * rank), (0, rank)
    shape = Backward(n, k, edges, True, True, wanted, wanted, False, False)
    given = order.order_of(m, programs, shape)
    rows = -(-m // BLOCK_M)
    makers, tiles = rows * shape.MAKERS, rows * shape.TILES_N
    sums = shape.PIECES * given["shares"]
    ring = machine.load()["ring"]
    ring.gl = SimpleNamespace(**vars(ring.gl) | {"num_programs": lambda axis: programs})
    made: list[int] = []
    seen: list[tuple[int, int]] = []
    summed: list[int] = []
    for item in range(makers + tiles + sums):
        late, index = ring.is_sum(
            item, makers + tiles, given["start"], given["block"], given["early"]
        )
        makes, before = ring.is_maker(index, makers, given["slack"])
        if late:
            assert len(made) == makers
            summed.append(index)
        elif makes:
            made.append(before)
        else:
            tile = ring.tile_at(index - before, rows, shape)
            assert {tile[0] * shape.MAKERS + part for part in range(shape.MAKERS)} <= set(made)
            seen.append(tile)
    assert made == list(range(makers))
    assert sorted(seen) == [(i, j) for i in range(rows) for j in range(shape.TILES_N)]
    assert sorted(summed) == list(range(sums))

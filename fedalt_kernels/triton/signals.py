"""How the programs of one launch wait for one another.

Counters are zero when a launch begins and when it ends: [0] is a ticket or counts arrivals, [1]
counts programs that have left, and from [2] on each flag tells that something may be read.
"""

import triton
import triton.language as tl

from .primitives import add_strip, dot, load_block, load_factor


@triton.jit
def publish(flag):
    """Announce that what this program has written may be read."""
    tl.debug_barrier()  # without it only the announcing thread's writes are ordered
    tl.atomic_add(flag, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(flag):
    """Spin until it has been announced.  A read-modify-write that adds nothing, since a plain spin
    followed by an acquire whose result is unused is deleted by the compiler."""
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") == 0:
        pass


@triton.jit
def await_strip(
    acc,
    flag,
    strip,
    side,
    row,
    column,
    M,
    C: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SIDE_OUT_MAJOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`add_strip` once the strip has been announced at `flag`.

    A small side is read before the wait, whose latency it then shares.
    """
    if RANKS == BLOCK_R and RANKS <= 32:
        STRIDE: tl.constexpr = RANKS if SIDE_OUT_MAJOR else C
        b_side = load_factor(
            side, 0, column, RANKS, C, STRIDE, BLOCK_R, BLOCK_N, SIDE_OUT_MAJOR, False
        )
        wait_for(flag)
        b_strip = load_block(strip, row, 0, M, RANKS, RANKS, BLOCK_M, BLOCK_R, False, False)
        return dot(b_strip, b_side, acc, PRECISION)  # [m, r] [r, n]
    else:
        wait_for(flag)
        return add_strip(
            acc,
            strip,
            side,
            row,
            column,
            M,
            C,
            RANKS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
            SIDE_OUT_MAJOR,
            PRECISION,
        )


@triton.jit
def leave_clean(counters, LENGTH):
    """The last program of the launch zeroes the counters, of which the second counts who left."""
    tl.debug_barrier()
    left = tl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu")
    if left == tl.num_programs(0) - 1:
        for i in range(LENGTH):
            tl.store(counters + i, 0)

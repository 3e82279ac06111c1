"""What Hopper's kernels are made of: a ring of slots, tickets, flags, and tiles of a product.

Every kernel is one persistent launch of two partitions.  The producer, one warp, takes tickets and
has blocks copied (TMA) into the slots of a ring; the consumers, two warp groups, multiply what lies
there (wgmma).  Tickets are handed out in order and an item waits only for earlier ones, hence for
programs that are running: no order of dispatch is assumed.

Grammar as in `primitives`; S are the sizes and flags of a launch, see `shapes`.

A variable that a loop carries must not be assigned a bare other one (``last = slot``): Triton's
frontend keeps its value from before the loop.  ``last = slot + 0`` is carried.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .blocks import product_layout

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7, and 3.6
TICKET = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))


class Ring(NamedTuple):
    """By slot: the ticket of the item that its blocks begin, and its two barriers."""

    tickets: Any  # int32, read once the slot is ready
    ready: Any  # all of its blocks have come
    empty: Any  # the product that reads them has ended


@gluon.jit
def make_ring(STAGES: gl.constexpr):
    tickets = gl.allocate_shared_memory(gl.int32, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    return Ring(tickets, ready, empty)


@gluon.jit
def slot_memory(rows, weight, S: gl.constexpr):
    """The ring's two parts: blocks of the rows' matrix, and of the weight, as they are copied."""
    TALL: gl.constexpr = S.BLOCK_N if S.OUT_MAJOR else S.BLOCK_K
    LONG: gl.constexpr = S.BLOCK_K if S.OUT_MAJOR else S.BLOCK_N
    xs = gl.allocate_shared_memory(rows.dtype, [S.STAGES, S.BLOCK_M, S.BLOCK_K], rows.layout)
    ws = gl.allocate_shared_memory(rows.dtype, [S.STAGES, TALL, LONG], weight.layout)
    return xs, ws


@gluon.jit
def parts_of(memory, source, SIZE: gl.constexpr, HEIGHT: gl.constexpr, WIDTH: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    """A part of the ring, SIZE elements a slot, for blocks of another matrix."""
    COUNT: gl.constexpr = STAGES * SIZE // (HEIGHT * WIDTH)
    return memory._reinterpret(source.dtype, [COUNT, HEIGHT, WIDTH], source.layout)


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The slot after this one, and the parity of its barriers' phase."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def take(counts):
    """The next ticket of the launch."""
    return gl.atomic_add(counts, 1, sem="relaxed", scope="gpu")


@gluon.jit
def hand_over(ring, slot, phase, item):
    """Leaves an item's ticket beside the slot where its blocks begin, once that is empty."""
    mbarrier.wait(ring.empty.index(slot), phase)
    ring.tickets.index(slot).store(gl.full([1], item, gl.int32, TICKET))


@gluon.jit
def await_item(ring, slot, phase):
    """The ticket beside the slot, once that is ready."""
    lone: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    mbarrier.wait(ring.ready.index(slot), phase)
    return gl.max(ring.tickets.index(slot).load(lone), 0)


@gluon.jit
def is_maker(item, makers, slack):
    """Whether an item makes a slice of the strip, and how many makers come before it.

    `slack` makers come first, then as many tiles as there are programs left, then the other makers:
    so the programs that take the first of them take them all, where `slack` is the number of
    programs that will have a tile fewer than others.
    """
    programs = gl.num_programs(0)
    later = makers - slack
    before = min(item, slack) + max(0, min(item - programs, later))
    makes = (item < slack) | ((item >= programs) & (item < programs + later))
    return makes, before


@gluon.jit
def is_sum(item, others, start, gap, early):
    """Whether an item is a sum over tokens, and its index among those or among the others.

    `early` sums come one after every `gap` others from `start` on, the rest at the end.
    """
    ahead = item - start
    turn = ahead // (gap + 1)
    passed = gl.where(ahead < 0, 0, min(early, turn + 1))
    inserted = (ahead >= 0) & (ahead % (gap + 1) == 0) & (turn < early)
    late = item - passed >= others
    index = gl.where(late, item - others, item - passed)
    return inserted | late, gl.where(inserted, turn, index)


@gluon.jit
def tile_at(index, tiles_m, S: gl.constexpr):
    """Tile (m, n), in groups of rows that go through the columns together, sharing the L2 cache."""
    first = index // (S.GROUP_M * S.TILES_N) * S.GROUP_M
    height = min(tiles_m - first, S.GROUP_M)
    inside = index % (S.GROUP_M * S.TILES_N)
    return first + inside % height, inside // height


@gluon.jit
def proxy_fence():
    """Orders ordinary accesses of global memory and the copies' (TMA), which go another way."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def publish(flag):
    """Announces that what these consumers have written may be copied."""
    barrier()  # without it only the announcing thread's writes are ordered
    proxy_fence()
    gl.atomic_add(flag, 1, sem="release", scope="gpu")


@gluon.jit
def wait_for(flag, count):
    """Spins until that many have been announced."""
    while gl.atomic_add(flag, 0, sem="acquire", scope="gpu") < count:
        pass
    proxy_fence()


@gluon.jit
def turned(block, TURN: gl.constexpr):
    """A block in shared memory, or its transpose."""
    if TURN:
        return block.permute((1, 0))
    else:
        return block


@gluon.jit
def multiply(
    acc,
    ls,
    rs,
    ring,
    slot,
    phase,
    last,
    held,
    steps,
    LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
    TURN_LEFT: gl.constexpr,
    TURN_RIGHT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """acc + Σ left · right over the next slots, of which each holds LEFT and RIGHT such blocks.

    One product is always under way; slot `last` is released when its own has ended, if `held`.
    Returns acc, slot, phase, and the slot that is still to be released.
    """
    for step in range(steps):
        mbarrier.wait(ring.ready.index(slot), phase)
        left = turned(ls.index(slot * LEFT), TURN_LEFT)
        right = turned(rs.index(slot * RIGHT), TURN_RIGHT)
        acc = warpgroup_mma(left, right, acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
        mbarrier.arrive(ring.empty.index(last), count=1, pred=held | (step > 0))
        last = slot + 0
        slot, phase = advance(slot, phase, STAGES)
    return acc, slot, phase, last


@gluon.jit
def finish(acc, ring, last):
    """The sum, once the last product has ended; releases its slot."""
    total = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(ring.empty.index(last), count=1)
    return total


@gluon.jit
def contract(
    slots,
    ring,
    slot,
    phase,
    LENGTH: gl.constexpr,
    STRIP: gl.constexpr,
    BLOCK: gl.constexpr,
    OUT_MAJOR: gl.constexpr,
    SIDE_OUT_MAJOR: gl.constexpr,
    S: gl.constexpr,
):
    """One tile: the product over LENGTH columns, and over STRIP of them, BLOCK at a time.

    Returns it, the next slot and its phase.
    """
    wide: gl.constexpr = product_layout(S.BLOCK_N, gl.num_warps())
    STEPS: gl.constexpr = (LENGTH + S.BLOCK_K - 1) // S.BLOCK_K
    MORE: gl.constexpr = (STRIP + BLOCK - 1) // BLOCK
    PER_SLOT: gl.constexpr = S.BLOCK_K // BLOCK
    acc = warpgroup_mma_init(gl.zeros((S.BLOCK_M, S.BLOCK_N), gl.float32, layout=wide))
    acc, slot, phase, last = multiply(
        acc, slots.xs, slots.ws, ring, slot, phase, slot, False, STEPS,
        1, 1, False, OUT_MAJOR, S.STAGES,
    )  # fmt: skip
    acc, slot, phase, last = multiply(
        acc, slots.ss, slots.us, ring, slot, phase, last, True, MORE,
        PER_SLOT, PER_SLOT, False, SIDE_OUT_MAJOR, S.STAGES,
    )  # fmt: skip
    return finish(acc, ring, last), slot, phase


@gluon.jit
def leave_clean(counts, length):
    """The last program of the launch zeroes the counters, of which the second counts who left."""
    barrier()
    left = gl.atomic_add(counts + 1, 1, sem="acq_rel", scope="gpu")
    if left == gl.num_programs(0) - 1:
        lay: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        for i in range(0, length, 256):
            o_count = i + gl.arange(0, 256, layout=lay)
            zero = gl.zeros([256], gl.int32, layout=lay)
            gl.store(counts + o_count, zero, mask=o_count < length)

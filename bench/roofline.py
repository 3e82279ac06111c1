"""What every schedule must move and compute, counted from its kernels, and how long that takes.

A launch lasts as long as the slowest of its three terms: bytes over the copy bandwidth, operations
of products over the matrix rate, operations of the dropout's generator over the integer rate; and
each launch costs a start.  Every tensor is counted once for each launch that reads or writes it,
and twice where a persistent launch reads it in both of its phases.  So this is a floor: waiting,
the low rate of narrow products and the tail of a grid are not in it.

    python -m bench roofline [--all]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .cases import ADAPTERS, Case, everything, goals, schedules

HALF, SINGLE = 2, 4  # bytes of an element
LOGITS, GATES = 16, 8  # columns of the kernels' blocks of logits and of gates
SHARES = 8  # of a sum over tokens
SLICES = 16  # of K, in a decode launch
MOST_JOINT_RANKS = 16  # of dB made with dP
ROWS_OF = {"overlapped": 128, "split": 64, "expand": 64}  # of a block that makes dP
RECOMPUTE_COLUMNS = 128  # of a tile
CALL_OPERATIONS = 420  # ten Philox rounds of two 64-bit products, in 32-bit instructions
ELEMENT_OPERATIONS = 4  # to cut out one byte, compare and select
ELEMENTS_A_CALL = 32


class Ceilings(NamedTuple):
    """What a GPU can do; the defaults were measured on an H200, but for the integer rate."""

    bandwidth: float = 4.3e12  # bytes/s, a copy's reads and writes together
    matrix: float = 790e12  # bfloat16 operations/s
    integer: float = 15e12  # 32-bit operations/s: 132 multiprocessors of 64 lanes at 1.75 GHz
    start_us: float = 2.5  # of a launch, its drain included


class Launch(NamedTuple):
    """One kernel: bytes moved, operations of its products, and of its dropout mask."""

    moved: float
    product: float = 0.0
    mask: float = 0.0

    def terms_us(self, ceilings: Ceilings) -> dict[str, float]:
        """How long each term would take alone."""
        return {
            "bandwidth": 1e6 * self.moved / ceilings.bandwidth,
            "matrix rate": 1e6 * self.product / ceilings.matrix,
            "dropout mask": 1e6 * self.mask / ceilings.integer,
        }


class Estimate(NamedTuple):
    """Sums over the launches of a pass."""

    time_us: float
    moved: float
    product: float
    launches: int
    bound: str


class _Sizes:
    """A case's tensors, in bytes."""

    def __init__(self, case: Case) -> None:
        self.m, self.n, self.k = case.m, case.layer.n, case.layer.k
        self.rank, self.ranks = case.rank, ADAPTERS * case.rank
        self.padded = max(16, 1 << (self.ranks - 1).bit_length())
        self.span = max(16, 1 << (self.rank - 1).bit_length())  # of the one trained adapter
        self.x, self.y = HALF * self.m * self.k, HALF * self.m * self.n
        self.w = HALF * self.n * self.k
        self.base = 2.0 * self.m * self.n * self.k  # operations
        self.down, self.up = HALF * self.padded * self.k, HALF * self.padded * self.n
        self.router = HALF * LOGITS * self.k
        self.low = HALF * self.m * self.ranks  # P
        self.strip = HALF * self.m * self.padded  # S, or dP
        self.gates = SINGLE * self.m * ADAPTERS
        self.dlogits = SINGLE * self.m * GATES
        self.mixer = SINGLE * ADAPTERS * self.k
        self.factors = SINGLE * self.ranks * (self.n + self.k)
        calls = self.m * -(-self.k // ELEMENTS_A_CALL)
        self.mask = 0.0
        if case.dropout:
            self.mask = calls * CALL_OPERATIONS + self.m * self.k * ELEMENT_OPERATIONS

    def plain(self) -> Launch:
        """y = x Wᵀ, and dX = dY W alike."""
        return Launch(self.x + self.w + self.y, self.base)

    def pack(self) -> Launch:
        """The adapters side by side, in the base's dtype."""
        read = self.factors + self.mixer
        return Launch(read + self.down + self.up + self.router)


def plain(case: Case) -> list[Launch]:
    """The plain frozen linear layer: forward; backward only dX."""
    return [_Sizes(case).plain()] * (2 if case.direction == "both" else 1)


def ours(case: Case, schedule: str) -> list[Launch]:
    """The launches of a case under a schedule."""
    launches = []
    if case.direction != "backward":
        launches += _forward(case, schedule)
    if case.direction != "forward":
        late = schedule == "overlapped" and case.dropout  # has no backward: split takes its place
        launches += _backward(case, "split" if late else schedule)
    return launches


def _forward(case: Case, schedule: str) -> list[Launch]:
    t = _Sizes(case)
    width = t.padded + LOGITS
    narrow = 2.0 * t.m * t.k * width  # operations of x [downᵀ | routerᵀ]
    expand = 2.0 * t.m * t.n * t.padded  # of S upᵀ
    project = Launch(t.x + t.down + t.router + t.low + t.strip + t.gates, narrow, t.mask)
    if schedule == "decode":
        rows = max(16, 1 << (t.m - 1).bit_length())
        slices = 2 * SINGLE * SLICES * rows * width
        kept = t.low + t.gates + 2 * t.strip
        moved = t.x + t.w + t.y + t.factors + t.mixer + slices + kept
        return [Launch(moved, t.base + narrow + expand)]
    if schedule == "recompute":
        columns = -(-t.n // RECOMPUTE_COLUMNS)
        moved = t.x + t.w + t.y + t.down + t.router + t.up + t.low + t.gates
        return [t.pack(), Launch(moved, t.base + narrow * columns + expand)]
    if schedule == "overlapped":
        moved = project.moved + t.x + t.w + t.y + t.strip + t.up
        return [t.pack(), Launch(moved, t.base + narrow + expand, t.mask)]
    if schedule == "split":
        moved = t.x + t.w + t.y + t.strip + t.up
        return [t.pack(), project, Launch(moved, t.base + expand)]
    return [t.pack(), project, t.plain(), Launch(2 * t.y + t.strip + t.up, expand)]


def _backward(case: Case, schedule: str) -> list[Launch]:
    t = _Sizes(case)
    joint = t.span <= MOST_JOINT_RANKS
    blocks = -(-t.m // ROWS_OF[schedule])
    up_shares = SINGLE * t.n * t.span * (blocks if joint else min(SHARES, blocks))
    down_shares = SINGLE * t.k * t.span * min(SHARES, blocks)
    mixer_shares = SINGLE * t.k * GATES * min(SHARES, blocks)
    spread = Launch(
        t.y + t.up + t.low + t.gates + t.strip + t.dlogits + (up_shares if joint else 0),
        2.0 * t.m * t.n * (t.padded + (t.span if joint else 0)),
    )
    strip = 2.0 * t.m * t.k * t.padded  # operations of dP down
    beside = t.strip + t.down + t.dlogits + t.mixer
    words = t.m * -(-t.k // ELEMENTS_A_CALL) * SINGLE if t.mask else 0  # the mask as bits
    ups = SINGLE * t.n * t.rank
    reduce_down = Launch(  # shares are written, and read by whoever adds them up
        t.x
        + t.strip
        + t.dlogits
        + words
        + 2 * (down_shares + mixer_shares)
        + SINGLE * t.k * (t.span + GATES)
        + (up_shares + ups if joint else 0),
        2.0 * t.m * t.k * (t.span + LOGITS),
    )
    launches = []
    if t.mask:
        launches.append(Launch(words, mask=t.mask))
    if schedule == "overlapped":
        moved = spread.moved + t.plain().moved + beside
        launches.append(Launch(moved, spread.product + t.base + strip))
    elif schedule == "split":
        launches += [spread, Launch(t.plain().moved + beside + words, t.base + strip)]
    else:
        launches += [spread, t.plain(), Launch(2 * t.x + beside + words, strip)]
    if not joint:
        moved = t.y + t.low + t.gates + 2 * up_shares + ups
        launches.append(Launch(moved, 2.0 * t.m * t.n * t.span))
    return [*launches, reduce_down]


def estimate(launches: Iterable[Launch], ceilings: Ceilings) -> Estimate:
    """The time of launches that follow one another."""
    listed = list(launches)
    time_us, bounds = 0.0, {"start of launches": len(listed) * ceilings.start_us}
    for launch in listed:
        terms = launch.terms_us(ceilings)
        slowest = max(terms, key=lambda term: terms[term])
        time_us += terms[slowest] + ceilings.start_us
        bounds[slowest] = bounds.get(slowest, 0.0) + terms[slowest]
    return Estimate(
        time_us,
        sum(launch.moved for launch in listed),
        sum(launch.product for launch in listed),
        len(listed),
        max(bounds, key=lambda term: bounds[term]),
    )


def rows(cases: Iterable[Case], ceilings: Ceilings) -> list[dict[str, object]]:
    """One row a case and schedule, the plain linear first."""
    found: list[dict[str, object]] = []
    for case in cases:
        floor = estimate(plain(case), ceilings)
        passes = {"plain": floor}
        passes |= {s: estimate(ours(case, s), ceilings) for s in schedules(case)}
        for schedule, each in passes.items():
            found.append(
                {
                    "layer": f"{case.layer.model} {case.layer.name}",
                    "M": case.m,
                    "N": case.layer.n,
                    "K": case.layer.k,
                    "r": case.rank,
                    "dropout": str(case.dropout),
                    "direction": case.direction,
                    "schedule": schedule,
                    "launches": each.launches,
                    "MiB moved": each.moved / 2**20,
                    "GFLOP": each.product / 1e9,
                    "µs": each.time_us,
                    "time / plain": each.time_us / floor.time_us,
                    "bound by": each.bound,
                }
            )
    return found


def main(whole: bool = False, ceilings: Ceilings | None = None) -> None:
    """Print the table: the goals' cases, or every case."""
    from .measure import markdown  # which needs PyTorch; the model does not

    ceilings = ceilings or Ceilings()
    table = rows(everything() if whole else goals(), ceilings)
    print(
        f"Floors at {ceilings.bandwidth / 1e12:.2f} TB/s, {ceilings.matrix / 1e12:.0f} TFLOP/s, "
        f"{ceilings.integer / 1e12:.0f} T integer operations/s, {ceilings.start_us} µs a launch\n"
    )
    print(markdown(table[0], [row.values() for row in table]))

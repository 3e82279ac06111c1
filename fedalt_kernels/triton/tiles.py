"""How each kernel is cut into tiles on each architecture, and which schedule serves which shape.

The table is what ships; ``python -m bench tune`` measures others on the GPU at hand and writes
``tuned/<device>.json`` beside this file, which then goes before the table on that device.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from .launch import Box
from .primitives import LOGITS

TUNED = Path(__file__).parent / "tuned"
WIDEST_RANK_BLOCK = 128
WIDEST_SINGLE_BLOCK = 32  # float32 without tensor cores holds its operands in registers
DECODE_ROWS = 64
LARGE = 128, 256  # the tile of long products
MOST_STRIP_STAGES = 7
GROUP_M = 8  # rows of tiles that go through the columns together, sharing the L2 cache
WIDE_RANKS = 32  # up to here the adapters' columns cost no registers to speak of


class Tile(NamedTuple):
    """Rows, columns and depth of a tile, pipeline stages and warps; 0 where a kernel has none."""

    m: int
    n: int
    k: int
    stages: int
    warps: int


class Ranks(NamedTuple):
    """Where each adapter's columns begin and end, their padded number, and columns in a block."""

    edges: tuple[int, ...]
    padded: int
    block: int


class Span(NamedTuple):
    """Ranks whose gradients are wanted: the first, how many are made, and the end of the wanted."""

    first: int
    width: int
    last: int


def side_by_side(sizes: Sequence[int], dtype: torch.dtype) -> Ranks:
    """The columns of adapters of these ranks, for products of this dtype."""
    widest = WIDEST_SINGLE_BLOCK if dtype == torch.float32 else WIDEST_RANK_BLOCK
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    block = min(max(16, triton.next_power_of_2(edges[-1])), widest)
    return Ranks(tuple(edges), triton.cdiv(edges[-1], block) * block, block)


# Kinds: "half" is bfloat16 and float16, "wide" half with more than 32 rank columns, "dropout" half
# with dropout, "single" float32, "odd" what is not aligned to 16 bytes, whose loads cost registers.
# A kind that a kernel does not name is served by "half"; "short", where it is named, takes the
# place of half and wide when these would leave multiprocessors without a tile.
Kinds = dict[str, Tile]
ODD = {
    "project": Tile(64, 0, 32, 2, 4),
    "contract": Tile(64, 64, 32, 2, 4),
    "contract_backward": Tile(64, 64, 32, 2, 4),
    "overlapped": Tile(64, 64, 32, 2, 8),
    "overlapped_backward": Tile(64, 64, 32, 2, 8),
    "recompute": Tile(64, 64, 32, 2, 8),
    "decode": Tile(16, 32, 32, 2, 4),
    "spread": Tile(64, 64, 0, 2, 8),
    "reduce": Tile(64, 64, 0, 2, 4),
}
SINGLE = {
    "project": Tile(32, 0, 32, 2, 4),
    "contract": Tile(32, 64, 16, 2, 8),
    "contract_backward": Tile(32, 64, 16, 2, 8),
    "overlapped": Tile(32, 64, 32, 2, 8),
    "overlapped_backward": Tile(32, 32, 16, 2, 8),
    "recompute": Tile(32, 64, 16, 2, 8),
    "decode": Tile(16, 32, 32, 2, 8),
    "spread": Tile(32, 16, 0, 2, 8),
    "reduce": Tile(16, 64, 0, 2, 8),
}
SHORT = Tile(64, 128, 64, 4, 4)
HOPPER = {
    "project": {
        "half": Tile(64, 0, 128, 3, 4),
        "short": Tile(32, 0, 128, 3, 4),
        "dropout": Tile(64, 0, 64, 3, 8),
    },
    "contract": {"half": Tile(128, 256, 64, 3, 8), "short": SHORT},
    "contract_backward": {
        "half": Tile(128, 256, 64, 3, 8),
        "short": SHORT,
        "dropout": Tile(128, 128, 64, 4, 8),
    },
    "overlapped": {
        "half": Tile(128, 256, 64, 3, 8),
        "short": SHORT,
        "dropout": Tile(128, 128, 64, 4, 8),
    },
    "overlapped_backward": {"half": Tile(128, 256, 64, 3, 8), "short": SHORT},
    "recompute": {"half": Tile(64, 128, 64, 4, 4)},
    "decode": {"half": Tile(16, 32, 128, 4, 4)},
    "spread": {
        "half": Tile(64, 128, 0, 3, 4),
        "wide": Tile(64, 128, 0, 3, 8),
        "short": Tile(32, 128, 0, 3, 4),
    },
    "reduce": {"half": Tile(64, 128, 0, 4, 8), "dropout": Tile(64, 64, 0, 3, 4)},
}
BLACKWELL = HOPPER | {
    "contract_backward": {"half": Tile(128, 128, 64, 4, 8), "short": SHORT},
    "overlapped": {"half": Tile(128, 128, 64, 4, 8), "short": SHORT},
    "overlapped_backward": {"half": Tile(64, 128, 64, 4, 8)},
    "reduce": {"half": Tile(64, 128, 0, 4, 8), "wide": Tile(64, 64, 0, 4, 8)},
}
AMPERE = {
    "project": {"half": Tile(64, 0, 64, 3, 4)},
    "contract": {"half": Tile(128, 128, 32, 3, 8)},
    "contract_backward": {"half": Tile(128, 128, 32, 4, 8)},
    "overlapped": {"half": Tile(128, 128, 32, 4, 8), "wide": Tile(64, 128, 32, 4, 8)},
    "overlapped_backward": {"half": Tile(128, 128, 32, 4, 8), "wide": Tile(64, 128, 32, 4, 8)},
    "recompute": {"half": Tile(64, 64, 64, 3, 4), "wide": Tile(64, 64, 64, 3, 8)},
    "decode": {"half": Tile(16, 32, 128, 4, 4)},
    "spread": {"half": Tile(64, 64, 0, 3, 4), "wide": Tile(64, 64, 0, 3, 8)},
    "reduce": {"half": Tile(64, 64, 0, 2, 8)},
}
# 64 KiB of shared memory: also what an unknown GPU is given.
SMALL = {
    "project": {"half": Tile(64, 0, 32, 2, 4)},
    "contract": {"half": Tile(128, 128, 32, 2, 8)},
    "contract_backward": {"half": Tile(128, 128, 32, 2, 8)},
    "overlapped": {"half": Tile(128, 128, 32, 2, 8)},
    "overlapped_backward": {"half": Tile(128, 128, 32, 2, 8)},
    "recompute": {"half": Tile(64, 64, 32, 2, 4)},
    "decode": {"half": Tile(16, 32, 128, 2, 4), "wide": Tile(16, 32, 64, 2, 4)},
    "spread": {"half": Tile(64, 64, 0, 2, 4)},
    "reduce": {"half": Tile(64, 64, 0, 2, 4)},
}
INTERPRETED = {kernel: {"half": Tile(32, 32, 32, 1, 4)} for kernel in HOPPER}
TABLE: dict[str, dict[str, Kinds]] = {
    "sm_80": AMPERE,
    "sm_90": HOPPER,
    "sm_100": BLACKWELL,
    "gfx942": SMALL,
    "generic": SMALL,
    "interpreter": INTERPRETED,
}
DESCRIBES = ("sm_90", "sm_100", "interpreter")  # tensor memory access
PUBLISHES = ("sm_80", "sm_90", "sm_100", "interpreter")  # release and acquire between programs


@cache
def architecture(device: torch.device) -> str:
    """The table's name for a device: its own, "generic", or "interpreter" on a CPU."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return name if name in TABLE else "generic"


def publishes(device: torch.device) -> bool:
    """Whether programs of one launch can order what they write and read among themselves."""
    return architecture(device) in PUBLISHES


def programs(device: torch.device) -> int:
    """How many programs a persistent launch has: one a multiprocessor."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def kind_of(dtype: torch.dtype, ranks: Ranks, dropout: bool, even: bool) -> str:
    """Which of a kernel's tiles, see `HOPPER`."""
    if dtype == torch.float32:
        return "single"
    if not even:
        return "odd"
    if dropout:
        return "dropout"
    return "wide" if ranks.padded > WIDE_RANKS else "half"


def tile_for(
    kernel: str, ranks: Ranks, *matrices: Tensor, dropout: bool = False, columns: int = 0
) -> tuple[Tile, bool]:
    """A kernel's tile for these matrices, and whether to read them through descriptors (TMA).

    The tile is the one measured on this device, else the table's.  `columns` are those of the
    output where the grid covers them as well as the first matrix's rows.
    """
    first = matrices[0]
    arch, even = architecture(first.device), aligned(*matrices)
    kind = kind_of(first.dtype, ranks, dropout, even)
    kinds = {"odd": ODD[kernel], "single": SINGLE[kernel]}
    kinds |= TABLE[arch][kernel] | tuned(first.device).get(kernel, {})
    tile = kinds.get(kind, kinds["half"])
    if "short" in kinds and kind in ("half", "wide"):
        across = triton.cdiv(columns, tile.n) if columns else 1
        if triton.cdiv(first.shape[0], tile.m) * across < programs(first.device):
            tile = kinds["short"]
    return tile, even and arch in DESCRIBES


def tile_through_pointers(kernel: str, x: Tensor) -> Tile:
    """A kernel's tile where clients' rows begin anywhere, which no descriptor allows."""
    if architecture(x.device) == "interpreter":
        return INTERPRETED[kernel]["half"]
    return (SINGLE if x.dtype == torch.float32 else ODD)[kernel]


@cache
def tuned(device: torch.device) -> dict[str, Kinds]:
    """The tiles that were measured on this kind of device; empty where none were."""
    path = TUNED / f"{device_name(device)}.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return {
        kernel: {kind: Tile(*sizes) for kind, sizes in kinds.items()}
        for kernel, kinds in record["tiles"].items()
    }


def device_name(device: torch.device) -> str:
    """A file name for a kind of device, such as nvidia-h200."""
    if device.type == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(device).lower().replace(" ", "-").replace("/", "-")


def precision(dtype: torch.dtype) -> str:
    """PRECISION of a kernel's products, see `primitives`."""
    if knobs.runtime.interpret and dtype == torch.bfloat16:
        return "upcast"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def stored(weight: Tensor) -> Tensor:
    """The row-major matrix of a weight [N, K], which may be a transposed view."""
    return weight if weight.stride(1) == 1 else weight.t()


def aligned(*matrices: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, as wide loads and descriptors want."""
    return all(
        matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
        for matrix in matrices
    )


def flat(height: int, width: int, like: Tensor) -> Tensor:
    """The outline of a contiguous matrix that is not there yet, by which a tile can be chosen."""
    return torch.empty(height, width, dtype=like.dtype, device="meta")


def boxed(height: int, width: int, stride: int, block: tuple[int, int], tma: bool) -> Box | None:
    """How a kernel takes a row-major matrix: through a descriptor of such blocks, or as it is."""
    return Box(height, width, stride, block) if tma else None


def forward_schedule(x: Tensor, weight: Tensor, ranks: Ranks, dropout: bool) -> str:
    """The schedule of a forward pass, see `fedalt_kernels.fused`."""
    device = x.device
    if x.shape[0] <= DECODE_ROWS:
        for schedule in ("decode", "recompute"):
            if unserved(schedule, x, ranks, dropout) is None:
                return schedule
    if x.dtype == torch.float32 or not _even(x, weight):
        return "expand"  # where cuBLAS is far ahead of Triton
    few = _has_few_tiles(x, weight.shape[0])
    if few and ranks.padded <= WIDE_RANKS and unserved("recompute", x, ranks, dropout) is None:
        return "recompute"
    wide_output = weight.shape[0] >= 8192 and ranks.padded > WIDE_RANKS
    late = unserved("overlapped", x, ranks, dropout) is None and architecture(device) in DESCRIBES
    return "overlapped" if late and not wide_output and not few else "split"


def backward_schedule(dy: Tensor, weight: Tensor, ranks: Ranks, dropout: bool) -> str:
    """The schedule of a backward pass."""
    if dy.dtype == torch.float32 or not _even(dy, weight):
        return "expand"
    late = unserved("overlapped", dy, ranks, dropout, backward=True) is None
    few = _has_few_tiles(dy, weight.shape[1])
    return "overlapped" if late and not few and architecture(dy.device) in DESCRIBES else "split"


def _even(rows: Tensor, weight: Tensor) -> bool:
    """Whether inputs and outputs of a layer, forward or backward, are aligned throughout."""
    sizes = [size * weight.element_size() % 16 for size in weight.shape]
    return not any(sizes) and aligned(rows, stored(weight))


def _has_few_tiles(rows: Tensor, columns: int) -> bool:
    """Whether large tiles of the output would leave multiprocessors without one."""
    tiles = triton.cdiv(rows.shape[0], LARGE[0]) * triton.cdiv(columns, LARGE[1])
    return tiles < programs(rows.device)


def unserved(
    schedule: str, x: Tensor, ranks: Ranks, dropout: bool, *, backward: bool = False
) -> str | None:
    """Why a schedule cannot serve these arguments; None if it can."""
    if schedule in ("decode", "overlapped") and not publishes(x.device):
        return f"programs cannot wait for one another on {architecture(x.device)}"
    if schedule == "decode" and x.shape[0] > DECODE_ROWS:
        return f"it serves up to {DECODE_ROWS} rows, got {x.shape[0]}"
    if schedule in ("decode", "recompute") and backward:
        return "it has no backward"
    if schedule in ("decode", "recompute", "overlapped") and ranks.padded > ranks.block:
        return f"it serves ranks of up to {ranks.block} in sum, got {ranks.edges[-1]}"
    if dropout and (schedule in ("decode", "recompute") or (backward and schedule == "overlapped")):
        return "it serves no dropout"
    return None


def strip_stages(tile: Tile, ranks: Ranks) -> int:
    """As many pipeline stages for the strips as fit into the memory that the base product takes."""
    width = tile.m + ranks.block + LOGITS.value
    return max(2, min(MOST_STRIP_STAGES, (tile.m + tile.n) * tile.stages // width))

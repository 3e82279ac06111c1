"""Which client a program serves: a table of row blocks, and all clients' adapters in one stack.

The rows are sorted by client.  A block of rows is one client's alone, so a program that is told its
client does with that client's rows and factors what the kernels for one client do with theirs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adapter import Branches
from .primitives import GATES, LOGITS
from .tiles import Ranks


class Table(NamedTuple):
    """Blocks of rows; int32."""

    blocks: Tensor  # [blocks, 2]: a block's client, and how many blocks of that one lie before it
    starts: Tensor  # [C + 1], every client's first row, then M


def table(sizes: Sequence[int], height: int, device: torch.device) -> Table:
    """The blocks of clients with so many rows each, made on the device without waiting for it.

    Their number is `blocks_at_most`, whatever the sizes: the last of them may have no rows, and say
    so by lying behind those of their client.
    """
    counts = torch.tensor(sizes).to(device, non_blocking=True)
    ends = counts.cumsum(0)
    needed = (counts + height - 1) // height
    last = needed.cumsum(0)
    numbers = torch.arange(blocks_at_most(sum(sizes), len(sizes), height), device=device)
    clients = torch.searchsorted(last, numbers, right=True).clamp_(max=len(sizes) - 1)
    places = numbers - (last - needed)[clients]
    starts = torch.cat((ends.new_zeros(1), ends))
    return Table(torch.stack((clients, places), 1).int(), starts.int())


def blocks_at_most(rows: int, count: int, height: int) -> int:
    """How many blocks that many clients' rows can need."""
    return rows // height + count


@triton.jit
def block_of(blocks, starts, index):
    """A block's client, its place among that client's, and that client's first row and rows."""
    client = tl.load(blocks + 2 * index)
    place = tl.load(blocks + 2 * index + 1)
    start, rows = rows_of(starts, client)
    return client.to(tl.int64), place, start, rows


@triton.jit
def rows_of(starts, client):
    """A client's first row and how many it has."""
    start = tl.load(starts + client)
    return start.to(tl.int64), tl.load(starts + client + 1) - start


class Stack(NamedTuple):
    """Every client's adapters side by side, as `pack.Packed` has those of one, in x's dtype."""

    down: Tensor  # [C, RANKS, K]
    router: Tensor | None  # [C, 16, K]
    up: Tensor  # s B [C, N, RANKS]


def stack(branches: Branches, ranks: Ranks, dtype: torch.dtype) -> Stack:
    """Of stacked adapters and mixers."""
    (count, _, k), n = branches.downs[0].shape, branches.ups[0].shape[1]
    like = branches.downs[0]
    down = like.new_zeros(count, ranks.padded, k, dtype=dtype)
    up = like.new_zeros(count, n, ranks.padded, dtype=dtype)
    spans = zip(ranks.edges, ranks.edges[1:], branches.downs, branches.ups, strict=False)
    for first, last, a, b in spans:
        down[:, first:last].copy_(a)
        up[:, :, first:last].copy_(b.float() * branches.scaling)
    router = None
    if branches.mixer is not None:
        wide, e = branches.mixer.float(), len(branches.downs)
        router = like.new_zeros(count, LOGITS.value, k, dtype=dtype)
        high = router[:, :e].copy_(wide)
        router[:, GATES.value : GATES.value + e].copy_(wide - high.float())
    return Stack(down, router, up)

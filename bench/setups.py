"""Layers whose launches cover every kernel, tile, dtype and flag that ships, on CPU tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fedalt_kernels import QuantizedWeight, Segments, fused, grouped_fused
from fedalt_kernels.adapter import Branches
from fedalt_kernels.checks import HOPPER, SCHEDULES
from fedalt_kernels.triton import hopper, tiles
from fedalt_kernels.weights import outline

M, N, K = 256, 512, 512
# bitsandbytes' storages, then fp8, which is e4m3: sm_80 has none, and gfx942 another one.
STORAGES = ("nf4", "nested nf4", "int8")
FP8_TARGETS = ("sm_90", "sm_100")


class Setup(NamedTuple):
    """A layer whose launches are wanted: its adapters' ranks, and what else decides on kernels."""

    sizes: tuple[int, ...]
    threshold: int = 0
    rows: int = M
    columns: int = K
    transposed: bool = False
    gated: bool = True
    storage: str = ""  # of a quantized weight


def setups(target: str, dtype: torch.dtype) -> list[Setup]:
    """Those of a target and dtype."""
    found = [
        Setup((8, 8)),
        Setup((8, 8), threshold=13),
        Setup((64, 64)),
        Setup((8, 8), rows=64),
        Setup((5, 3, 9), columns=K + 1),
    ]
    if dtype == torch.bfloat16:  # what differs in flags only need not be made in every dtype
        found.append(Setup((16,) * 8, rows=M - 6))
        found.append(Setup((16, 16), transposed=True, gated=False))
        found.append(Setup((64, 64), threshold=13))
        found.append(Setup((64, 64), rows=64))
        found.append(Setup((130, 20)))
        found.append(Setup((16, 16), threshold=13))
    storages = [*STORAGES, "fp8"] if target in FP8_TARGETS else STORAGES
    found += [Setup((8, 8), storage=storage) for storage in storages]
    found += [Setup((8, 8), rows=tiles.DECODE_ROWS, storage=storage) for storage in storages]
    return found


def run_schedules(dtype: torch.dtype, setup: Setup) -> None:
    """Runs every schedule on tensors whose values do not matter."""
    sizes, threshold, m, k, transposed, gated, storage = setup
    n = k + N - K
    x, weight, dy = (torch.zeros(*shape, dtype=dtype) for shape in ((m, k), (n, k), (m, n)))
    if transposed:
        weight = weight.t().contiguous().t()
    if storage:
        weight = _stored(storage, n, k)
    downs = [torch.zeros(size, k) for size in sizes]
    ups = [torch.zeros(n, size) for size in sizes]
    mixer = torch.zeros(len(sizes), k) if gated else None
    seed = torch.tensor(1) if threshold else None
    branches = Branches(downs, ups, mixer, None, 2.0, threshold, seed)
    ranks = tiles.side_by_side(sizes, dtype)
    for schedule in SCHEDULES:
        rows = x[:16] if schedule == "decode" and m != tiles.DECODE_ROWS else x
        if tiles.unserved(schedule, rows, ranks, threshold > 0) is None:
            forced = branches._replace(schedule=schedule)
            fused.forward(rows, weight, torch.zeros(n, dtype=dtype), forced)
    like, own = outline(weight, dtype), branches._replace(schedule=HOPPER)
    if hopper.unserved(x, like, hopper.forward_shape(x, like, False, own)) is None:
        fused.forward(x, weight, None, own)
    low = x.new_zeros(m, sum(sizes))
    gates = x.new_zeros(m, len(sizes), dtype=torch.float32) if gated else None
    needs = [True, gated] + ([True] + [False] * (len(sizes) - 1)) * 2
    for schedule in SCHEDULES:
        if tiles.unserved(schedule, dy, ranks, threshold > 0, backward=True) is None:
            forced = branches._replace(schedule=schedule)
            fused.backward(dy, x, weight, low, gates, forced, needs)
    shape = hopper.backward_shape(like, own, needs)
    if hopper.serves_backward(dy, x, like, own, shape):
        fused.backward(dy, x, weight, low, gates, own, needs)


def run_clients(dtype: torch.dtype) -> None:
    """Runs all that serves many clients, on tensors whose values do not matter."""
    rank, k, n = 8, K, N
    for threshold in (0, 13) if dtype == torch.bfloat16 else (13,):
        x, weight, dy = (torch.zeros(*shape, dtype=dtype) for shape in ((M, k), (n, k), (M, n)))
        downs, ups = [torch.zeros(3, rank, k)] * 2, [torch.zeros(3, n, rank)] * 2
        seed = torch.zeros(3, dtype=torch.int64) if threshold else None
        branches = Branches(downs, ups, torch.zeros(3, 2, k), None, 2.0, threshold, seed)
        low, gates = x.new_zeros(M, 2 * rank), x.new_zeros(M, 2, dtype=torch.float32)
        segments, bias = Segments((M - 1, 0, 1), None, None), torch.zeros(n, dtype=dtype)
        grouped_fused.forward(x, weight, bias, branches, segments)
        alone, few = branches._replace(threshold=0, seed=None), Segments.of([0, 2, 0], 3)
        grouped_fused.forward(x[:3], weight, bias, alone, few)
        needs = [True, True] + [True, False] * 2
        grouped_fused.backward(dy, x, weight, low, gates, branches, segments, needs)


def _stored(storage: str, n: int, k: int) -> QuantizedWeight:
    """Zeros in one of the storages, in bitsandbytes' usual blocks."""
    single, block, nested_block = torch.float32, 64, 256
    if not storage.endswith("nf4"):
        dtype = torch.int8 if storage == "int8" else torch.float8_e4m3fn
        data = torch.zeros(n, k, dtype=dtype)
        return QuantizedWeight(storage, (n, k), (data, torch.zeros(n, dtype=single)))
    octets, code = torch.zeros(n * k // 2, dtype=torch.uint8), torch.zeros(16)
    count = n * k // block
    if storage == "nf4":
        return QuantizedWeight("nf4", (n, k), (octets, torch.zeros(count), code), (block,))
    nested = torch.zeros(count // nested_block), torch.zeros(256), torch.zeros(())
    tensors = (octets, torch.zeros(count, dtype=torch.uint8), code, *nested)
    return QuantizedWeight("nf4", (n, k), tensors, (block, nested_block))

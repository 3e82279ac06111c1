"""A quantized weight written out as a matrix, for the schedules that read one many times."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plans import MOST
from .launch import Launch
from .primitives import rounded, store_block
from .quantized import load_absmax, load_octets, look_up
from .tiles import precision

ELEMENTS = 4096  # of a program, at least a block
ROWS = 8
WARPS = 4


@triton.jit
def _from_blocks(
    source,
    statistics,
    target,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """GROUPS blocks of the flattened matrix, whose rows they may cross."""
    BLOCK: tl.constexpr = BLOCKS[0]
    TOTAL: tl.constexpr = N * K
    o_group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    o_octet = o_group[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    octets = tl.load(source + o_octet, mask=2 * o_octet < TOTAL, other=0)
    absmax = load_absmax(statistics, o_group, o_group * BLOCK < TOTAL, BLOCKS)
    values = look_up(octets, statistics[1]) * absmax[:, None]
    o_value = o_group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = rounded(values, target.dtype.element_ty, PRECISION)
    tl.store(target + o_value, values, mask=o_value < TOTAL)


@triton.jit
def _from_rows(
    source,
    scale,
    target,
    divisor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the matrix, whose rows have a scale each."""
    ACROSS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    row, at = tl.program_id(0) // ACROSS * BLOCK_N, tl.program_id(0) % ACROSS * BLOCK_K
    o_row = row + tl.arange(0, BLOCK_N)
    b_scale = tl.load(scale + o_row, mask=o_row < N, other=0.0)
    values = load_octets(source, row, at, N, K, BLOCK_N, BLOCK_K, False)
    values = tl.div_rn(values * b_scale[:, None], divisor)
    store_block(target, values, row, at, N, K, K, BLOCK_N, BLOCK_K, False, PRECISION)


def dequantize(
    tensors: Sequence[Tensor], blocks: tuple[int, ...], divisor: float, target: Tensor
) -> Tensor:
    """Fills the target [N, K], contiguous, and returns it.

    Args:
        tensors, blocks: as of `fedalt_kernels.quantized.QuantizedWeight`, fp8 data as uint8.
        divisor: of the scales of rows.
    """
    source, *statistics = tensors
    kinds = source.dtype, *[each.dtype for each in statistics]
    launch = _dequantizing(target.shape, target.dtype, kinds, blocks, divisor, target.device)
    launch(source, tuple(statistics) if blocks else statistics[0], target)
    return target


@lru_cache(maxsize=MOST)
def _dequantizing(
    shape: tuple[int, int],
    dtype: torch.dtype,
    kinds: tuple[torch.dtype, ...],
    blocks: tuple[int, ...],
    divisor: float,
    device: torch.device,
) -> Launch:
    """The launch for a kind of weight; of `kinds` and the device its compiled code depends."""
    n, k = shape
    if blocks:
        groups = max(1, ELEMENTS // blocks[0])
        return Launch(
            _from_blocks,
            (triton.cdiv(n * k, groups * blocks[0]),),
            ("source", "statistics", "target"),
            warps=WARPS,
            N=n,
            K=k,
            BLOCKS=blocks,
            GROUPS=groups,
            PRECISION=precision(dtype),
        )
    width = ELEMENTS // ROWS
    return Launch(
        _from_rows,
        (triton.cdiv(n, ROWS) * triton.cdiv(k, width),),
        ("source", "scale", "target"),
        warps=WARPS,
        divisor=divisor,
        N=n,
        K=k,
        BLOCK_N=ROWS,
        BLOCK_K=width,
        PRECISION=precision(dtype),
    )

"""`side` and `up`: the mixer's parts and all adapters side by side, in x's dtype, in one launch."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...adapter import Branches
from ..launch import Launch
from ..pack import are_mixed, sources
from ..primitives import down_pointers, split_parts, store_block, up_pointers
from ..tiles import precision
from .shapes import head_of, rounded_up

BLOCK = 128
BLOCK_R = 16


@triton.jit
def _pack_sides(
    downs,
    ups,
    mixer,
    side,
    up,
    scaling,
    K: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    HEAD: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_R
    TILES_K: tl.constexpr = (K + BLOCK - 1) // BLOCK
    if program < TILES_K:
        k = program * BLOCK
        o_k = k + tl.arange(0, BLOCK)
        m_k = (o_k < K)[None, :]
        o_row = row + tl.arange(0, BLOCK_R)
        if row < HEAD:
            p_head = mixer + (o_row % E)[:, None] * K + o_k[None, :]
            b_head = tl.load(p_head, mask=(o_row < 3 * E)[:, None] & m_k, other=0.0)
            is_low = (o_row >= 2 * E)[:, None]
            dtype: tl.constexpr = side.dtype.element_ty
            b_rows = split_parts(b_head.to(tl.float32), is_low, dtype, PRECISION).to(tl.float32)
        else:
            p_down = down_pointers(downs, o_row - HEAD, K, E, EDGES)[:, None] + o_k[None, :]
            m_down = (o_row - HEAD < EDGES[E])[:, None] & m_k
            b_rows = tl.load(p_down, mask=m_down, other=0.0).to(tl.float32)
        ROWS: tl.constexpr = HEAD + EDGES[E]
        store_block(side, b_rows, row, k, ROWS, K, K, BLOCK_R, BLOCK, False, PRECISION)
    elif row < EDGES[E]:
        n = (program - TILES_K) * BLOCK
        o_n = n + tl.arange(0, BLOCK)
        o_rank = row + tl.arange(0, BLOCK_R)
        p_up = up_pointers(ups, o_n, o_rank, E, EDGES)
        m_up = (o_n < N)[:, None] & (o_rank < EDGES[E])[None, :]
        b_up = tl.load(p_up, mask=m_up, other=0.0).to(tl.float32) * scaling
        store_block(up, b_up, n, row, N, EDGES[E], STRIDE, BLOCK, BLOCK_R, False, PRECISION)


def siding(
    n: int, k: int, dtype: torch.dtype, edges: tuple[int, ...], first: Branches
) -> Callable[[Tensor, Branches], tuple[Tensor, Tensor]]:
    """Plans, of adapters like the first: side [HEAD + R, K] and up [N, R], s multiplied into up.

    The rows of `up` lie apart by a multiple of 8; what is between them is left as it is.
    """
    gated, mixed = first.mixer is not None, are_mixed(first)
    head, stride = head_of(len(edges) - 1, gated), rounded_up(edges[-1])
    launch = Launch(
        _pack_sides,
        (triton.cdiv(k, BLOCK) + triton.cdiv(n, BLOCK), triton.cdiv(head + edges[-1], BLOCK_R)),
        ("downs", "ups", "mixer", "side", "up"),
        scaling=float(first.scaling),
        K=k,
        N=n,
        E=len(edges) - 1,
        EDGES=edges,
        HEAD=head,
        STRIDE=stride,
        BLOCK=BLOCK,
        BLOCK_R=BLOCK_R,
        PRECISION=precision(dtype),
    )
    rows = head + edges[-1]
    sizes = [rows * k, n * stride]
    total = sum(sizes)

    def run(x: Tensor, branches: Branches) -> tuple[Tensor, Tensor]:
        side, up = torch.split_with_sizes(x.new_empty(total), sizes)
        mixer = None if branches.mixer is None else branches.mixer.contiguous()
        launch(sources(branches.downs, mixed), sources(branches.ups, mixed), mixer, side, up)
        return side.view(rows, k), up.view(n, stride)

    return run

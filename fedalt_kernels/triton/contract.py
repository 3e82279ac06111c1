"""The base product with the adapters as its first contraction step; y forward, dX backward."""

import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    add_bias,
    add_mixer,
    add_strip,
    contract,
    kept_bits,
    load_block,
    store_block,
    tile_at,
)
from .tiles import GROUP_M, Ranks, described, precision, stored, tile_for


@triton.jit(do_not_specialize=["M"])
def _contract(
    left,
    weight,
    strip,
    side,
    bias,
    dlogits,
    mixer,
    words,
    out,
    M,
    stride_left,
    stride_weight,
    L: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    BASE: tl.constexpr,
    BIAS: tl.constexpr,
    BACKWARD: tl.constexpr,
    GATED: tl.constexpr,
    DROPOUT: tl.constexpr,
    OUT_MAJOR: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [M, C] = left [M, L] · weight + strip · side + bias, or + the mixer's term, masked."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m, tile_n = tile_at(tl.program_id(0), tiles_m, tl.cdiv(C, BLOCK_N), GROUP_M)
    row, at = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = add_strip(
        acc, strip, side, row, at, M, C, RANKS, BLOCK_M, BLOCK_N, BLOCK_R, not BACKWARD, PRECISION
    )
    if DROPOUT:
        acc = tl.where(kept_bits(words, row, at, M, C, BLOCK_M, BLOCK_N), acc, 0.0)
    if BASE:
        acc = contract(
            acc,
            left,
            weight,
            row,
            at,
            M,
            stride_left,
            stride_weight,
            L,
            C,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            STAGES,
            OUT_MAJOR,
            EVEN_M,
            TMA,
            PRECISION,
        )
    else:
        acc += load_block(out, row, at, M, C, C, BLOCK_M, BLOCK_N, False, TMA).to(tl.float32)
    if BIAS:
        acc = add_bias(acc, bias, at, C, BLOCK_N)
    if BACKWARD and GATED:
        acc = add_mixer(acc, dlogits, mixer, row, at, M, C, E, BLOCK_M, BLOCK_N)
    store_block(out, acc, row, at, M, C, C, BLOCK_M, BLOCK_N, TMA, PRECISION)


def contract_with_strip(
    left: Tensor,
    weight: Tensor,
    strip: Tensor,
    side: Tensor,
    ranks: Ranks,
    *,
    bias: Tensor | None = None,
    backward: bool = False,
    dlogits: Tensor | None = None,
    mixer: Tensor | None = None,
    words: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Forward x Wᵀ + S upᵀ + b; backward dY W + mask ⊙ (dP down) + dl G.

    Args:
        left: [M, L], x or dY.
        weight: [N, K], one of its strides 1.
        strip: [M, RANKS], S or dP.
        side: up [N, RANKS], or backward down [RANKS, K].
        bias: [N] or None.
        backward: which of the two.
        dlogits: dl [M, 8] in float32, or None without a mixer.
        mixer: [E, K], contiguous, with `dlogits`.
        words: the mask, from `dropout.mask_words`, or None without dropout.
        base: the base product where it has been made already; it is overwritten by the result.
    """
    m = left.shape[0]
    length, columns = weight.shape if backward else weight.shape[::-1]
    rows = stored(weight)
    out_major = (rows is weight) != backward  # whether the contraction runs along its rows
    out = left.new_empty(m, columns) if base is None else base
    dropout = words is not None
    kernel = "contract_backward" if backward else "contract"
    tile, tma = tile_for(kernel, ranks, left, rows, out, dropout=dropout, columns=columns)
    wide = (tile.n, tile.k) if out_major else (tile.k, tile.n)
    _contract[(triton.cdiv(m, tile.m) * triton.cdiv(columns, tile.n),)](
        left=described(left, tile.m, tile.k, tma),
        weight=described(rows, *wide, tma),
        strip=strip,
        side=side,
        bias=bias,
        dlogits=dlogits,
        mixer=mixer,
        words=words,
        out=described(out, tile.m, tile.n, tma),
        M=m,
        stride_left=left.stride(0),
        stride_weight=rows.stride(0),
        L=length,
        C=columns,
        E=len(ranks.edges) - 1,
        RANKS=ranks.padded,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=min(ranks.block, tile.k),
        GROUP_M=GROUP_M,
        STAGES=tile.stages,
        BASE=base is None,
        BIAS=bias is not None,
        BACKWARD=backward,
        GATED=dlogits is not None,
        DROPOUT=dropout,
        OUT_MAJOR=out_major,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(left.dtype),
        num_warps=tile.warps,
    )
    return out

"""The base product with the adapters as its first contraction step; y forward, dX backward."""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
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
from .tiles import GROUP_M, Ranks, boxed, flat, precision, stored, tile_for


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


def contracting(
    left: Tensor,
    weight: Tensor,
    ranks: Ranks,
    *,
    bias: bool = False,
    backward: bool = False,
    gated: bool = False,
    dropout: bool = False,
    base: bool = True,
) -> Callable[..., Tensor]:
    """Plans, forward, x Wᵀ + S upᵀ + b; backward, dY W + mask ⊙ (dP down) + dl G.

    Args:
        left: [M, L], x or dY, or one like it.
        weight: [N, K], one of its strides 1.
        bias: whether there is one.
        backward: which of the two.
        gated: backward, whether there is a mixer.
        dropout: backward, whether there is a mask.
        base: False where the base product comes ready made.

    Returns:
        Of left, weight, strip (S or dP [M, RANKS]), side (up [N, RANKS] or down [RANKS, K]), bias
        [N], dl [M, 8] in float32, mixer [E, K], the mask's words from `dropout.masking` and the
        ready base product, each None where there is none: the sum, in the base product's place if
        there is one.
    """
    m = left.shape[0]
    length, columns = weight.shape if backward else weight.shape[::-1]
    rows = stored(weight)
    out_major = (rows is weight) != backward  # whether the contraction runs along its rows
    kernel = "contract_backward" if backward else "contract"
    like = flat(m, columns, left)
    tile, tma = tile_for(kernel, ranks, left, rows, like, dropout=dropout, columns=columns)
    wide = (tile.n, tile.k) if out_major else (tile.k, tile.n)
    boxes = {
        "left": boxed(m, length, left.stride(0), (tile.m, tile.k), tma),
        "weight": boxed(rows.shape[0], rows.shape[1], rows.stride(0), wide, tma),
        "out": boxed(m, columns, columns, (tile.m, tile.n), tma),
    }
    launch = Launch(
        _contract,
        (triton.cdiv(m, tile.m) * triton.cdiv(columns, tile.n),),
        ("left", "weight", "strip", "side", "bias", "dlogits", "mixer", "words", "out"),
        boxes,
        tile.warps,
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
        BASE=base,
        BIAS=bias,
        BACKWARD=backward,
        GATED=gated,
        DROPOUT=dropout,
        OUT_MAJOR=out_major,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(left.dtype),
    )

    def run(
        left: Tensor,
        weight: Tensor,
        strip: Tensor,
        side: Tensor,
        bias: Tensor | None = None,
        dlogits: Tensor | None = None,
        mixer: Tensor | None = None,
        words: Tensor | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        out = left.new_empty(m, columns) if base is None else base
        launch(left, weight, strip, side, bias, dlogits, mixer, words, out)
        return out

    return run

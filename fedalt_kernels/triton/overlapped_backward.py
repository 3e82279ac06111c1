"""The backward of `overlapped`: dP and dl first, then the tiles of dX, which need them last."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .primitives import add_mixer, contract, store_block, tile_at
from .signals import await_strip, leave_clean, publish
from .strips import spread_outputs, spread_rows
from .tiles import (
    GROUP_M,
    Ranks,
    described,
    precision,
    programs,
    stored,
    strip_stages,
    tile_for,
)
from .workspace import counters


@triton.jit(do_not_specialize=["M"])
def _overlapped_backward(
    dy,
    weight,
    up,
    down,
    low,
    gates,
    mixer,
    weights,
    dx,
    dlow,
    dlogits,
    dup,
    counts,
    scaling,
    M,
    stride_dy,
    stride_weight,
    K: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FIRST: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    STRIP_STAGES: tl.constexpr,
    GATED: tl.constexpr,
    JOINT: tl.constexpr,
    OUT_MAJOR: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dP, dl and shares of dB first, then the tiles of dX, whose columns are BLOCK_N of K."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    flags = counts + 2
    item = tl.atomic_add(counts, 1, sem="relaxed", scope="gpu")
    while item < tiles_m + tiles_m * tiles_n:
        if item < tiles_m:
            spread_rows(
                item,
                dy,
                up,
                low,
                gates,
                weights,
                scaling,
                dlow,
                dlogits,
                dup,
                M,
                stride_dy,
                N,
                E,
                EDGES,
                RANKS,
                BLOCK_M,
                BLOCK_K,
                BLOCK_R,
                FIRST,
                SPAN,
                STRIP_STAGES,
                GATED,
                JOINT,
                EVEN_M,
                TMA,
                PRECISION,
            )
            publish(flags + item)
        else:
            tile_m, tile_n = tile_at(item - tiles_m, tiles_m, tiles_n, GROUP_M)
            row, at = tile_m * BLOCK_M, tile_n * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc = contract(
                acc,
                dy,
                weight,
                row,
                at,
                M,
                stride_dy,
                stride_weight,
                N,
                K,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                STAGES,
                OUT_MAJOR,
                EVEN_M,
                TMA,
                PRECISION,
            )
            acc = await_strip(
                acc,
                flags + tile_m,
                dlow,
                down,
                row,
                at,
                M,
                K,
                RANKS,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
                False,
                PRECISION,
            )
            if GATED:
                acc = add_mixer(acc, dlogits, mixer, row, at, M, K, E, BLOCK_M, BLOCK_N)
            store_block(dx, acc, row, at, M, K, K, BLOCK_M, BLOCK_N, TMA, PRECISION)
        item = tl.atomic_add(counts, 1, sem="relaxed", scope="gpu")
    leave_clean(counts, 2 + tiles_m)


def overlapped_backward(
    dy: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    mixer: Tensor | None,
    low: Tensor,
    gates: Tensor | None,
    weights: Sequence[float],
    ranks: Ranks,
    scaling: float,
    span: tuple[int, int] | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dX [M, K] and what `backward.spread` returns, whose arguments these are as well."""
    m, n = dy.shape
    k = weight.shape[1]
    dx, rows = dy.new_empty(m, k), stored(weight)
    tile, tma = tile_for("overlapped_backward", ranks, dy, rows, dx, columns=k)
    dlow, dlogits, dup = spread_outputs(dy, ranks, gates, span, tile.m)
    out_major = rows is not weight
    _overlapped_backward[(programs(dy.device),)](
        dy=described(dy, tile.m, tile.k, tma),
        weight=described(rows, *((tile.n, tile.k) if out_major else (tile.k, tile.n)), tma),
        up=up,
        down=down,
        low=low,
        gates=gates,
        mixer=mixer,
        weights=tuple(weights),
        dx=described(dx, tile.m, tile.n, tma),
        dlow=dlow,
        dlogits=dlogits,
        dup=dup,
        counts=counters(dy.device, 2 + triton.cdiv(m, tile.m)),
        scaling=float(scaling),
        M=m,
        stride_dy=dy.stride(0),
        stride_weight=rows.stride(0),
        K=k,
        N=n,
        E=len(ranks.edges) - 1,
        EDGES=ranks.edges,
        RANKS=ranks.padded,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=ranks.block,
        FIRST=span[0] if span else 0,
        SPAN=span[1] if span else 0,
        GROUP_M=GROUP_M,
        STAGES=tile.stages,
        STRIP_STAGES=strip_stages(tile, ranks),
        GATED=gates is not None,
        JOINT=span is not None,
        OUT_MAJOR=out_major,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(dy.dtype),
        num_warps=tile.warps,
    )
    return dx, dlow, dlogits, dup

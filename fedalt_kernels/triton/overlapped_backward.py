"""The backward of `overlapped`: dP and dl first, then the tiles of dX, which need them last."""

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .primitives import add_mixer, contract, store_block, tile_at
from .signals import await_strip, leave_clean, publish
from .strips import spread_outputs, spread_rows
from .tiles import (
    GROUP_M,
    Ranks,
    Span,
    boxed,
    flat,
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


def overlapping_backward(
    dy: Tensor,
    weight: Tensor,
    gated: bool,
    weights: Sequence[float],
    ranks: Ranks,
    scaling: float,
    span: Span | None,
) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]], int]:
    """Plans dX [M, K] and what `backward.spreading` plans, whose arguments these are as well.

    It is of dY, W, down [RANKS, K], up [N, RANKS], mixer [E, K] or None, P and the gates.
    """
    (m, n), k = dy.shape, weight.shape[1]
    rows = stored(weight)
    tile, tma = tile_for("overlapped_backward", ranks, dy, rows, flat(m, k, dy), columns=k)
    outputs = spread_outputs(dy, ranks, gated, span, tile.m)
    out_major = rows is not weight
    boxes = {
        "dy": boxed(m, n, dy.stride(0), (tile.m, tile.k), tma),
        "weight": boxed(
            rows.shape[0],
            rows.shape[1],
            rows.stride(0),
            (tile.n, tile.k) if out_major else (tile.k, tile.n),
            tma,
        ),
        "dx": boxed(m, k, k, (tile.m, tile.n), tma),
    }
    launch = Launch(
        _overlapped_backward,
        (programs(dy.device),),
        (
            *("dy", "weight", "up", "down", "low", "gates", "mixer"),
            *("dx", "dlow", "dlogits", "dup", "counts"),
        ),
        boxes,
        tile.warps,
        weights=tuple(weights),
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
        FIRST=span.first if span else 0,
        SPAN=span.width if span else 0,
        GROUP_M=GROUP_M,
        STAGES=tile.stages,
        STRIP_STAGES=strip_stages(tile, ranks),
        GATED=gated,
        JOINT=span is not None,
        OUT_MAJOR=out_major,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(dy.dtype),
    )
    flags = 2 + triton.cdiv(m, tile.m)

    def run(
        dy: Tensor,
        weight: Tensor,
        down: Tensor,
        up: Tensor,
        mixer: Tensor | None,
        low: Tensor,
        gates: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        dx, made = dy.new_empty(m, k), outputs(dy)
        counts = counters(dy.device, flags)
        launch(dy, weight, up, down, low, gates, mixer, dx, *made, counts)
        return dx, *made

    return run, triton.cdiv(m, tile.m)

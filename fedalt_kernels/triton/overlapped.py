"""Strip and base product in one persistent launch; `overlapped_backward` is its counterpart.

The first work items make the strip (S, or dP), and announce each block of it; the tiles of the base
product need it only in their last step, so they rarely wait.  Items are handed out by a ticket and
wait only on earlier ones, hence on programs that are running: no order of dispatch is assumed, and
nothing deadlocks.  The last program out zeroes the counters, so a CUDA graph can replay the launch.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .pack import Packed
from .primitives import LOGITS, add_bias, contract, store_block, tile_at
from .signals import await_strip, leave_clean, publish
from .strips import project_rows
from .tiles import (
    GROUP_M,
    Ranks,
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
def _overlapped(
    x,
    weight,
    down,
    router,
    up,
    bias,
    weights,
    seed,
    y,
    low,
    gated,
    gates,
    counts,
    threshold,
    M,
    stride_x,
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
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    STRIP_STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    DROPOUT: tl.constexpr,
    OUT_MAJOR: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Work items in the order of a ticket, blocks of S first, then the tiles of y."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    flags = counts + 2
    item = tl.atomic_add(counts, 1, sem="relaxed", scope="gpu")
    while item < tiles_m + tiles_m * tiles_n:
        if item < tiles_m:
            project_rows(
                item,
                x,
                down,
                router,
                weights,
                tl.load(seed) if DROPOUT else 0,
                threshold,
                low,
                gated,
                gates,
                M,
                stride_x,
                0,
                0,
                K,
                E,
                EDGES,
                RANKS,
                BLOCK_M,
                BLOCK_K,
                BLOCK_R,
                STRIP_STAGES,
                GATED,
                DROPOUT,
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
                x,
                weight,
                row,
                at,
                M,
                stride_x,
                stride_weight,
                K,
                N,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                STAGES,
                OUT_MAJOR,
                EVEN_M,
                TMA,
                PRECISION,
            )
            if BIAS:
                acc = add_bias(acc, bias, at, N, BLOCK_N)
            acc = await_strip(
                acc,
                flags + tile_m,
                gated,
                up,
                row,
                at,
                M,
                N,
                RANKS,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
                True,
                PRECISION,
            )
            store_block(y, acc, row, at, M, N, N, BLOCK_M, BLOCK_N, TMA, PRECISION)
        item = tl.atomic_add(counts, 1, sem="relaxed", scope="gpu")
    leave_clean(counts, 2 + tiles_m)


def overlapping(
    x: Tensor,
    weight: Tensor,
    bias: bool,
    gated: bool,
    weights: Sequence[float],
    ranks: Ranks,
    threshold: int,
) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """Plans y [M, N], P [M, R] and the gates [M, E] or None, of x, W, bias, the packed and a seed.

    Arguments are those of `forward.projecting` and of such a call, or like them.
    """
    (m, k), n, e = x.shape, weight.shape[0], len(ranks.edges) - 1
    rows = stored(weight)
    out_major = rows is weight
    like = flat(m, n, x), flat(ranks.padded, k, x)
    tile, tma = tile_for("overlapped", ranks, x, rows, *like, dropout=threshold > 0, columns=n)
    wide = (tile.n, tile.k) if out_major else (tile.k, tile.n)
    boxes = {
        "x": boxed(m, k, x.stride(0), (tile.m, tile.k), tma),
        "weight": boxed(rows.shape[0], rows.shape[1], rows.stride(0), wide, tma),
        "down": boxed(ranks.padded, k, k, (ranks.block, tile.k), tma),
        "router": boxed(LOGITS.value, k, k, (LOGITS.value, tile.k), tma),
        "y": boxed(m, n, n, (tile.m, tile.n), tma),
    }
    launch = Launch(
        _overlapped,
        (programs(x.device),),
        (
            *("x", "weight", "down", "router", "up", "bias", "seed"),
            *("y", "low", "gated", "gates", "counts"),
        ),
        boxes,
        tile.warps,
        weights=tuple(weights),
        threshold=threshold,
        M=m,
        stride_x=x.stride(0),
        stride_weight=rows.stride(0),
        K=k,
        N=n,
        E=e,
        EDGES=ranks.edges,
        RANKS=ranks.padded,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=ranks.block,
        GROUP_M=GROUP_M,
        STAGES=tile.stages,
        STRIP_STAGES=strip_stages(tile, ranks),
        BIAS=bias,
        GATED=gated,
        DROPOUT=threshold > 0,
        OUT_MAJOR=out_major,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(x.dtype),
    )
    flags = 2 + triton.cdiv(m, tile.m)

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed, seed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y, low = x.new_empty(m, n), x.new_empty(m, ranks.edges[-1])
        strip = x.new_empty(m, ranks.padded)
        gates = x.new_empty(m, e, dtype=torch.float32) if gated else None
        counts = counters(x.device, flags)
        launch(x, weight, *packed.of(0), bias, seed, y, low, strip, gates, counts)
        return y, low, gates

    return run

"""A few rows, as in generation: bound by one read of W, so all else must hide behind it.

One launch of two phases.  A few programs each make one slice of K of P and of the logits, and the
last of them to arrive adds the slices up in fixed order, gates them and announces S; the others
stream their rows of W meanwhile and need S only at the end.  Adapters and mixer are read where they
lie, in their own dtype, since packing them would be a second launch.

A quantized weight is dequantized on its way, tile by tile; the scales of rows are left to the sum.

The programs that make S are the first of the grid.  GPUs dispatch those first, though CUDA does not
promise it; a ticket, as `overlapped` draws one, would cost an estimated 0.7 of the ten µs
that a whole launch takes at N = K = 4096.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adapter import Branches
from .launch import Launch
from .pack import are_mixed, sources
from .primitives import (
    GATES,
    LOGITS,
    add_bias,
    dot,
    down_pointers,
    load_block,
    load_factor,
    mixer_rows,
    rounded,
    softmax_gates,
    spread_gates,
    store_block,
    up_pointers,
)
from .quantized import load_quantized
from .signals import leave_clean, publish, wait_for
from .tiles import Ranks, precision, stored, tile_for
from .workspace import counters

SLICES = 16  # of K, one a program


@triton.jit
def _slice(
    program,
    x,
    downs,
    mixer,
    partial,
    M,
    stride_x,
    K: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LENGTH: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """This program's slice of P [BLOCK_M, RANKS] and of the logits' parts [BLOCK_M, 16]."""
    b_low = tl.zeros((BLOCK_M, RANKS), tl.float32)
    parts = tl.zeros((BLOCK_M, LOGITS), tl.float32)
    o_rank = tl.arange(0, RANKS)
    last = min(K, program * LENGTH + LENGTH)
    for k in tl.range(program * LENGTH, last, BLOCK_K, num_stages=2):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = load_block(x, 0, k, M, K, stride_x, BLOCK_M, BLOCK_K, False, False)
        p_down = down_pointers(downs, o_rank, K, E, EDGES)[:, None] + o_k[None, :]
        m_down = (o_rank < EDGES[E])[:, None] & (o_k < K)[None, :]
        b_down = tl.load(p_down, mask=m_down, other=0.0).to(tl.float32)
        b_down = rounded(b_down, b_x.dtype, PRECISION)
        b_low = dot(b_x, b_down.T, b_low, PRECISION)  # [m, k] [k, r]
        if GATED:
            b_router = mixer_rows(mixer, k, K, BLOCK_K, E, b_x.dtype, PRECISION)
            parts = dot(b_x, b_router.T, parts, PRECISION)  # [m, k] [k, 16]
    WIDTH: tl.constexpr = RANKS + LOGITS
    partial += program * BLOCK_M * WIDTH
    store_block(partial, b_low, 0, 0, BLOCK_M, WIDTH, WIDTH, BLOCK_M, RANKS, False, PRECISION)
    store_block(partial, parts, 0, RANKS, BLOCK_M, WIDTH, WIDTH, BLOCK_M, LOGITS, False, PRECISION)


@triton.jit
def _finish(
    partial,
    weights,
    low,
    gated,
    gates,
    M,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICES: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sum of all slices, in order; keeps P and the gates, writes S [BLOCK_M, RANKS]."""
    WIDTH: tl.constexpr = RANKS + LOGITS
    b_low = tl.zeros((BLOCK_M, RANKS), tl.float32)
    parts = tl.zeros((BLOCK_M, LOGITS), tl.float32)
    for i in range(SLICES):
        here = partial + i * BLOCK_M * WIDTH
        b_low += load_block(here, 0, 0, BLOCK_M, WIDTH, WIDTH, BLOCK_M, RANKS, True, False)
        parts += load_block(here, 0, RANKS, BLOCK_M, WIDTH, WIDTH, BLOCK_M, LOGITS, True, False)
    b_gates = softmax_gates(parts, E)
    wide = spread_gates(b_gates, weights, tl.arange(0, RANKS), E, EDGES, GATED)
    b_gated = b_low * wide
    store_block(gated, b_gated, 0, 0, BLOCK_M, RANKS, RANKS, BLOCK_M, RANKS, False, PRECISION)
    store_block(low, b_low, 0, 0, M, EDGES[E], EDGES[E], BLOCK_M, RANKS, False, PRECISION)
    if GATED:
        store_block(gates, b_gates, 0, 0, M, E, E, BLOCK_M, GATES, False, PRECISION)


@triton.jit(do_not_specialize=["M"])
def _decode(
    x,
    weight,
    statistics,
    bias,
    downs,
    ups,
    mixer,
    weights,
    y,
    low,
    gated,
    gates,
    partial,
    counts,
    scaling,
    divisor,
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
    STAGES: tl.constexpr,
    SLICES: tl.constexpr,
    LENGTH: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    OUT_MAJOR: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs 0 to SLICES - 1 make S; each of the others BLOCK_N columns of y."""
    program = tl.program_id(0)
    arrived, ready = counts, counts + 2
    if program < SLICES:
        _slice(
            program,
            x,
            downs,
            mixer,
            partial,
            M,
            stride_x,
            K,
            E,
            EDGES,
            RANKS,
            BLOCK_M,
            BLOCK_K,
            LENGTH,
            GATED,
            PRECISION,
        )
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == SLICES - 1:
            _finish(
                partial,
                weights,
                low,
                gated,
                gates,
                M,
                E,
                EDGES,
                RANKS,
                BLOCK_M,
                SLICES,
                GATED,
                PRECISION,
            )
            publish(ready)
    else:
        at = (program - SLICES) * BLOCK_N
        o_n = at + tl.arange(0, BLOCK_N)
        o_rank = tl.arange(0, RANKS)
        m_up = (o_n < N)[:, None] & (o_rank < EDGES[E])[None, :]
        p_up = up_pointers(ups, o_n, o_rank, E, EDGES)
        b_up = tl.load(p_up, mask=m_up, other=0.0).to(tl.float32) * scaling
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            b_x = load_block(x, 0, k, M, K, stride_x, BLOCK_M, BLOCK_K, False, False)
            if QUANTIZED:
                b_weight = load_quantized(
                    weight,
                    statistics,
                    at,
                    k,
                    N,
                    K,
                    BLOCK_N,
                    BLOCK_K,
                    BLOCKS,
                    b_x.dtype,
                    PRECISION,
                ).T
            else:
                b_weight = load_factor(
                    weight, k, at, K, N, stride_weight, BLOCK_K, BLOCK_N, OUT_MAJOR, False
                )
            if x.dtype.element_ty == tl.float32:
                # Tile by tile, as cuBLAS sums: a single run over K would lose three times as much.
                zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                acc += dot(b_x, b_weight, zero, PRECISION)  # [m, k] [k, n]
            else:
                acc = dot(b_x, b_weight, acc, PRECISION)
        if QUANTIZED and len(BLOCKS) == 0:
            b_scale = tl.load(statistics[0] + o_n, mask=o_n < N, other=0.0)
            acc *= (b_scale / divisor)[None, :]
        wait_for(ready)
        b_gated = load_block(gated, 0, 0, BLOCK_M, RANKS, RANKS, BLOCK_M, RANKS, True, False)
        b_up = rounded(b_up, b_gated.dtype, PRECISION)
        acc = dot(b_gated, b_up.T, acc, PRECISION)  # [m, r] [r, n]
        if BIAS:
            acc = add_bias(acc, bias, at, N, BLOCK_N)
        store_block(y, acc, 0, at, M, N, N, BLOCK_M, BLOCK_N, False, PRECISION)
    leave_clean(counts, 3)


def decoding(
    x: Tensor,
    weight: Tensor,
    bias: bool,
    branches: Branches,
    weights: Sequence[float],
    ranks: Ranks,
    quantized: Any = None,
) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """Plans y [M, N], P [M, R] and the gates [M, E] or None, for up to 64 rows, without dropout.

    It is of x, the weight or a quantized one's data, the bias, branches and a quantized weight's
    statistics.  Arguments are those of such a call, or like them.

    Args:
        quantized: what `weights.octets` made of a quantized weight, whose data is then `weight`.
    """
    (m, k), n, e = x.shape, weight.shape[0], len(branches.downs)
    gated, mixed = branches.mixer is not None, are_mixed(branches)
    rows = stored(weight)
    tile, _ = tile_for("decode", ranks, x, rows)
    block_m = max(tile.m, triton.next_power_of_2(m))
    length = triton.cdiv(triton.cdiv(k, SLICES), tile.k) * tile.k
    width = ranks.padded + LOGITS.value
    launch = Launch(
        _decode,
        (SLICES + triton.cdiv(n, tile.n),),
        (
            *("x", "weight", "statistics", "bias", "downs", "ups", "mixer"),
            *("y", "low", "gated", "gates", "partial", "counts"),
        ),
        None,
        tile.warps,
        weights=tuple(weights),
        scaling=float(branches.scaling),
        divisor=quantized.divisor if quantized else 1.0,
        M=m,
        stride_x=x.stride(0),
        stride_weight=rows.stride(0),
        K=k,
        N=n,
        E=e,
        EDGES=ranks.edges,
        RANKS=ranks.padded,
        BLOCK_M=block_m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        STAGES=tile.stages,
        SLICES=SLICES,
        LENGTH=length,
        BIAS=bias,
        GATED=gated,
        OUT_MAJOR=rows is weight,
        QUANTIZED=quantized is not None,
        BLOCKS=quantized.blocks if quantized else (),
        PRECISION=precision(x.dtype),
    )

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        branches: Branches,
        statistics: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y, low = x.new_empty(m, n), x.new_empty(m, ranks.edges[-1])
        gates = x.new_empty(m, e, dtype=torch.float32) if gated else None
        launch(
            x,
            weight,
            statistics,
            bias,
            sources(branches.downs, mixed),
            sources(branches.ups, mixed),
            None if branches.mixer is None else branches.mixer.contiguous(),
            y,
            low,
            x.new_empty(block_m, ranks.padded),
            gates,
            x.new_empty(SLICES, block_m, width, dtype=torch.float32),
            counters(x.device, 3),
        )
        return y, low, gates

    return run

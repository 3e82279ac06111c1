"""A few rows of many clients, in any order, as in generation: each row looks up its client.

With hardly two rows of one client, a row reads its client's adapters by itself, where they lie and
in their own dtype, in vectors and not in tiles; the base product comes ready made.  Two launches:
slices of K of P and of the logits; their sums in fixed order, gated, times B, added to y.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adapter import Branches
from .launch import Launch
from .pack import are_mixed, sources
from .primitives import GATES, LOGITS, rounded, softmax_gates, spread_gates
from .tiles import Ranks, precision

SLICES = 8  # of K
BLOCK_R = 16
BLOCK_K = 128
BLOCK_N = 64


@triton.jit
def client_downs(downs, client, o_rank, K: tl.constexpr, E: tl.constexpr, EDGES: tl.constexpr):
    """Where each rank's row [K] of a client begins, in E stacks A_e [C, r_e, K]."""
    p_row = downs[0] + (client * EDGES[1] + o_rank) * K
    for e in tl.static_range(1, E):
        mine = downs[e] + (client * (EDGES[e + 1] - EDGES[e]) + o_rank - EDGES[e]) * K
        p_row = tl.where(o_rank >= EDGES[e], mine, p_row)
    return p_row


@triton.jit
def client_ups(ups, client, o_n, o_rank, N: tl.constexpr, E: tl.constexpr, EDGES: tl.constexpr):
    """Where element (n, rank) of a client lies, in E stacks B_e [C, N, r_e]."""
    o_row = (client * N + o_n)[:, None]
    o_rank = o_rank[None, :]
    p_block = ups[0] + o_row * EDGES[1] + o_rank
    for e in tl.static_range(1, E):
        mine = ups[e] + o_row * (EDGES[e + 1] - EDGES[e]) + o_rank - EDGES[e]
        p_block = tl.where(o_rank >= EDGES[e], mine, p_block)
    return p_block


@triton.jit
def _narrow_rows(
    x,
    downs,
    mixer,
    owners,
    partial,
    stride_x,
    K: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LENGTH: tl.constexpr,
    GATED: tl.constexpr,
):
    """A row's slice of K of a block of P; the first block's program makes the logits too."""
    WIDTH: tl.constexpr = RANKS + LOGITS
    slice, row, rank = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_R
    client = tl.load(owners + row)
    o_rank = rank + tl.arange(0, BLOCK_R)
    o_gate = tl.arange(0, LOGITS)
    p_down = client_downs(downs, client, o_rank, K, E, EDGES)
    b_low = tl.zeros((BLOCK_R,), tl.float32)
    b_logits = tl.zeros((LOGITS,), tl.float32)
    last = min(K, slice * LENGTH + LENGTH)
    for k in tl.range(slice * LENGTH, last, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = tl.load(x + row.to(tl.int64) * stride_x + o_k, mask=o_k < K, other=0.0)
        b_x = b_x.to(tl.float32)[None, :]
        m_down = (o_rank < EDGES[E])[:, None] & (o_k < K)[None, :]
        b_down = tl.load(p_down[:, None] + o_k[None, :], mask=m_down, other=0.0)
        b_low += tl.sum(b_down.to(tl.float32) * b_x, 1)  # [r, k] [k]
        if GATED:
            if rank == 0:
                p_mixer = mixer + (client * E + o_gate)[:, None] * K + o_k[None, :]
                m_mixer = (o_gate < E)[:, None] & (o_k < K)[None, :]
                b_mixer = tl.load(p_mixer, mask=m_mixer, other=0.0)
                b_logits += tl.sum(b_mixer.to(tl.float32) * b_x, 1)  # [16, k] [k]
    partial += (slice * tl.num_programs(1) + row) * WIDTH
    tl.store(partial + o_rank, b_low)
    if rank == 0:
        tl.store(partial + RANKS + o_gate, b_logits)


@triton.jit
def _expand_rows(
    y,
    partial,
    ups,
    bias,
    weights,
    owners,
    places,
    low,
    gates,
    scaling,
    N: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    SORTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds a row's S Bᵀ + b to BLOCK_N columns of y; keeps P and g where the row is sorted to."""
    WIDTH: tl.constexpr = RANKS + LOGITS
    at, row, rows = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.num_programs(1)
    client = tl.load(owners + row)
    place = row if SORTED else tl.load(places + row)
    o_n = at + tl.arange(0, BLOCK_N)
    o_gate = tl.arange(0, LOGITS)
    partial += row * WIDTH
    parts = tl.zeros((1, LOGITS), tl.float32)
    for i in range(SLICES):
        parts += tl.load(partial + i * rows * WIDTH + RANKS + o_gate)[None, :]
    b_gates = softmax_gates(parts, E)
    p_y = y + row.to(tl.int64) * N + o_n
    acc = tl.load(p_y, mask=o_n < N, other=0.0).to(tl.float32)
    for rank in tl.range(0, RANKS, BLOCK_R):
        o_rank = rank + tl.arange(0, BLOCK_R)
        b_low = tl.zeros((1, BLOCK_R), tl.float32)
        for i in range(SLICES):
            b_low += tl.load(partial + i * rows * WIDTH + o_rank)[None, :]
        if at == 0:
            p_low = low + place * EDGES[E] + o_rank[None, :]
            tl.store(
                p_low,
                rounded(b_low, low.dtype.element_ty, PRECISION),
                mask=(o_rank < EDGES[E])[None, :],
            )
        strip = b_low * spread_gates(b_gates, weights, o_rank, E, EDGES, GATED)
        m_up = (o_n < N)[:, None] & (o_rank < EDGES[E])[None, :]
        b_up = tl.load(client_ups(ups, client, o_n, o_rank, N, E, EDGES), mask=m_up, other=0.0)
        acc += scaling * tl.sum(b_up.to(tl.float32) * strip, 1)  # [n, r] [r]
    if BIAS:
        acc += tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    tl.store(p_y, rounded(acc, y.dtype.element_ty, PRECISION), mask=o_n < N)
    if GATED:
        if at == 0:
            o_e = tl.arange(0, GATES)[None, :]
            tl.store(gates + place * E + o_e, b_gates, mask=o_e < E)


def decoding_clients(
    x: Tensor, outputs: int, bias: bool, branches: Branches, weights: Sequence[float], ranks: Ranks
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Plans P [M, R] and the gates [M, E] or None of a few rows, and adds the rest to y.

    Args:
        x: [M, K], or one like it, in any order.
        outputs: N.
        bias: whether there is one.
        branches: stacked; without dropout.
        weights: E fixed gates, where there are no mixers.

    Returns:
        Of x, y = x Wᵀ [M, N], the bias or None, the branches, the client of each row, int64 [M],
        and its place among the sorted rows, int64 [M], or None where they lie so: P and the gates,
        at those places.  It adds to y.
    """
    (m, k), e, gated = x.shape, len(branches.downs), branches.mixer is not None
    mixed, padded = are_mixed(branches), triton.cdiv(ranks.edges[-1], BLOCK_R) * BLOCK_R
    length = triton.cdiv(triton.cdiv(k, SLICES), BLOCK_K) * BLOCK_K
    common = {"E": e, "EDGES": ranks.edges, "RANKS": padded, "BLOCK_R": BLOCK_R, "GATED": gated}
    narrow = Launch(
        _narrow_rows,
        (SLICES, m, padded // BLOCK_R),
        ("x", "downs", "mixer", "owners", "partial"),
        stride_x=x.stride(0),
        K=k,
        BLOCK_K=BLOCK_K,
        LENGTH=length,
        **common,
    )

    def expanding(in_order: bool) -> Launch:
        return Launch(
            _expand_rows,
            (triton.cdiv(outputs, BLOCK_N), m),
            ("y", "partial", "ups", "bias", "owners", "places", "low", "gates"),
            weights=tuple(weights),
            scaling=float(branches.scaling),
            N=outputs,
            BLOCK_N=BLOCK_N,
            SLICES=SLICES,
            BIAS=bias,
            SORTED=in_order,
            PRECISION=precision(x.dtype),
            **common,
        )

    expand = {in_order: expanding(in_order) for in_order in (True, False)}

    def run(
        x: Tensor,
        y: Tensor,
        bias: Tensor | None,
        branches: Branches,
        owners: Tensor,
        places: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        low = x.new_empty(m, ranks.edges[-1])
        gates = x.new_empty(m, e, dtype=torch.float32) if gated else None
        partial = x.new_empty(SLICES, m, padded + LOGITS.value, dtype=torch.float32)
        mixer = None if branches.mixer is None else branches.mixer.contiguous()
        narrow(x, sources(branches.downs, mixed), mixer, owners, partial)
        ups = sources(branches.ups, mixed)
        expand[places is None](y, partial, ups, bias, owners, places, low, gates)
        return low, gates

    return run

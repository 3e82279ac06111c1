"""dP, dl and shares of dB from one pass over dY, in a launch of its own.

dX is then made by `contract`; `overlapped_backward` is both in one launch.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .strips import spread_outputs, spread_rows
from .tiles import Ranks, described, precision, tile_for


@triton.jit(do_not_specialize=["M"])
def _spread(
    dy,
    up,
    low,
    gates,
    weights,
    dlow,
    dlogits,
    dup,
    scaling,
    M,
    stride_dy,
    N: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FIRST: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    JOINT: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`spread_rows` for every block of rows."""
    spread_rows(
        tl.program_id(0),
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
        BLOCK_N,
        BLOCK_R,
        FIRST,
        SPAN,
        STAGES,
        GATED,
        JOINT,
        EVEN_M,
        TMA,
        PRECISION,
    )


def spread(
    dy: Tensor,
    up: Tensor,
    low: Tensor,
    gates: Tensor | None,
    weights: Sequence[float],
    ranks: Ranks,
    scaling: float,
    span: tuple[int, int] | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dP, dl and shares of dB, in one pass over dY.

    Args:
        dy: [M, N].
        up: [N, RANKS], the packed up-projections, s included.
        low, gates: P [M, R] and g [M, E] or None, from the forward.
        weights: E fixed gates, where there are no others.
        scaling: s, for dB.
        span: (first rank, number of ranks, padded to a power of two) of the dB that is wanted of
            the same pass, or None.

    Returns:
        dP [M, RANKS] in dY's dtype, dl [M, 8] in float32 or None without gates, and dB's shares
        [row blocks, N, ranks of the span] in float32 or None without a span.
    """
    m, n = dy.shape
    tile, tma = tile_for("spread", ranks, dy)
    dlow, dlogits, dup = spread_outputs(dy, ranks, gates, span, tile.m)
    _spread[(triton.cdiv(m, tile.m),)](
        dy=described(dy, tile.m, tile.n, tma),
        up=up,
        low=low,
        gates=gates,
        weights=tuple(weights),
        dlow=dlow,
        dlogits=dlogits,
        dup=dup,
        scaling=float(scaling),
        M=m,
        stride_dy=dy.stride(0),
        N=n,
        E=len(ranks.edges) - 1,
        EDGES=ranks.edges,
        RANKS=ranks.padded,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=ranks.block,
        FIRST=span[0] if span else 0,
        SPAN=span[1] if span else 0,
        STAGES=tile.stages,
        GATED=gates is not None,
        JOINT=span is not None,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(dy.dtype),
        num_warps=tile.warps,
    )
    return dlow, dlogits, dup

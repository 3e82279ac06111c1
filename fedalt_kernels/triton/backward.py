"""dP, dl and shares of dB from one pass over dY, in a launch of its own.

dX is then made by `contract`; `overlapped_backward` is both in one launch.
"""

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .strips import spread_outputs, spread_rows
from .tiles import Ranks, Span, boxed, precision, tile_for


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


def spreading(
    dy: Tensor,
    gated: bool,
    weights: Sequence[float],
    ranks: Ranks,
    scaling: float,
    span: Span | None,
) -> tuple[Callable[..., tuple[Tensor, Tensor | None, Tensor | None]], int]:
    """Plans dP, dl and shares of dB, in one pass over dY; and says how many shares.

    Args:
        dy: [M, N], or one like it.
        gated: whether there is a mixer; else `weights`, E fixed gates, gate.
        scaling: s, for dB.
        span: the dB that is wanted of the same pass, or None.

    Returns:
        Of dY, up [N, RANKS], P [M, R] and g [M, E] or None: dP [M, RANKS] in dY's dtype, dl [M, 8]
        in float32 or None without gates, and dB's shares [row blocks, N, ranks of the span] in
        float32 or None without a span.
    """
    m, n = dy.shape
    tile, tma = tile_for("spread", ranks, dy)
    outputs = spread_outputs(dy, ranks, gated, span, tile.m)
    launch = Launch(
        _spread,
        (triton.cdiv(m, tile.m),),
        ("dy", "up", "low", "gates", "dlow", "dlogits", "dup"),
        {"dy": boxed(m, n, dy.stride(0), (tile.m, tile.n), tma)},
        tile.warps,
        weights=tuple(weights),
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
        FIRST=span.first if span else 0,
        SPAN=span.width if span else 0,
        STAGES=tile.stages,
        GATED=gated,
        JOINT=span is not None,
        EVEN_M=tma or m % tile.m == 0,
        TMA=tma,
        PRECISION=precision(dy.dtype),
    )

    def run(
        dy: Tensor, up: Tensor, low: Tensor, gates: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        made = outputs(dy)
        launch(dy, up, low, gates, *made)
        return made

    return run, triton.cdiv(m, tile.m)

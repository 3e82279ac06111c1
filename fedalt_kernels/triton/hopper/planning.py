"""Plans of Hopper's kernels: what a pass allocates and launches, and which calls they serve."""

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from ...adapter import Branches
from ..dropout import masking
from ..launch import Box, Launch
from ..tiles import (
    aligned,
    architecture,
    backward_schedule,
    forward_schedule,
    programs,
    side_by_side,
    stored,
)
from ..workspace import counters
from . import record
from .backward import FLAGS as BACKWARD_FLAGS
from .backward import _hopper_backward
from .forward import FLAGS as FORWARD_FLAGS
from .forward import _hopper
from .order import order_of, slack_of
from .pack import siding
from .shapes import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    COLUMNS,
    MOST_RANKS,
    MOST_SUMMED,
    WIDEST,
    Backward,
    Constants,
    Forward,
    rounded_up,
)

WARPS = 4  # of a consumer


def edges_of(branches: Branches) -> tuple[int, ...]:
    edges = [0]
    for down in branches.downs:
        edges.append(edges[-1] + down.shape[0])
    return tuple(edges)


def serves_forward(x: Tensor, weight: Tensor, branches: Branches) -> bool:
    """Whether a call is the forward kernel's: by name, or where it is proven and large enough.

    Raises:
        RuntimeError: it was asked for by name and cannot serve.
    """
    shape = forward_shape(x, weight, False, branches)
    reason = unserved(x, weight, shape)
    if branches.schedule == "hopper":
        if reason:
            raise RuntimeError(f"schedule 'hopper' cannot serve this call: {reason}")
        return True
    if branches.schedule or reason or record.unproven(x.device):
        return False
    ranks = side_by_side([a.shape[0] for a in branches.downs], x.dtype)
    return forward_schedule(x, weight, ranks, shape.DROPOUT) in ("overlapped", "split")


def serves_backward(
    dy: Tensor, x: Tensor, weight: Tensor, branches: Branches, shape: Backward
) -> bool:
    """Whether a call is the backward kernel's; where it cannot serve, others do."""
    reason = unserved(dy, weight, shape) or unserved(x, weight, shape)
    if shape.MOST > MOST_SUMMED:
        reason = f"gradients of {shape.MOST} ranks are wanted, and it sums up to {MOST_SUMMED}"
    if shape.DROPOUT and (shape.SIDE > WIDEST or shape.HEAD > 16):
        reason = "under dropout it serves five adapters, and ranks of up to 48 in sum"
    if reason or branches.schedule == "hopper":
        return reason is None
    if branches.schedule or record.unproven(dy.device):
        return False
    ranks = side_by_side([a.shape[0] for a in branches.downs], dy.dtype)
    return backward_schedule(dy, weight, ranks, shape.DROPOUT) in ("overlapped", "split")


def unserved(rows: Tensor, weight: Tensor, shape: Forward | Backward) -> str | None:
    """Why a kernel cannot serve rows [M, ...]; None if it can."""
    if not runs_on(rows.device):
        return f"it is for sm_90, and this is {architecture(rows.device)}"
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16, got {rows.dtype}"
    if any(size % 8 for size in weight.shape) or not aligned(rows, stored(weight)):
        return "rows must begin at multiples of 16 bytes"
    if shape.RANKS > MOST_RANKS:
        return f"it serves ranks of up to {MOST_RANKS} in sum, got {shape.RANKS}"
    return None


def runs_on(device: torch.device) -> bool:
    return architecture(device) == "sm_90"


def forward_shape(x: Tensor, weight: Tensor, bias: bool, branches: Branches) -> Forward:
    n, k = weight.shape
    gated, dropout = branches.mixer is not None, branches.threshold > 0
    out_major = stored(weight) is weight
    return Forward(n, k, edges_of(branches), gated, bias, dropout, out_major)


def mixing(
    x: Tensor, weight: Tensor, bias: bool, branches: Branches, weights: Sequence[float]
) -> Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]]:
    """Plans y [M, N], P [M, R], the gates [M, E] or None, side and up; of x, W, bias, branches."""
    m, k = x.shape
    shape = forward_shape(x, weight, bias, branches)
    n, ranks, rows = shape.N, shape.RANKS, stored(weight)
    pack = siding(n, k, x.dtype, shape.EDGES, branches)
    mask = masking(m, k, branches.threshold) if shape.DROPOUT else None
    high = shape.HEAD + ranks
    wide = (BLOCK_N, BLOCK_K) if shape.OUT_MAJOR else (BLOCK_K, BLOCK_N)
    launch = Launch(
        _hopper,
        (programs(x.device),),
        (
            *("x", "weight", "x_rows", "narrow", "router", "strip", "up", "y", "bias"),
            *("gated", "low", "gates", "words", "counts"),
        ),
        {
            "x": Box(m, k, x.stride(0), (BLOCK_M, BLOCK_K)),
            "weight": Box(rows.shape[0], rows.shape[1], rows.stride(0), wide),
            "x_rows": Box(m, k, x.stride(0), (BLOCK_M, shape.DEPTH)),
            "narrow": Box(high, k, k, (shape.WIDTH, shape.DEPTH)),
            "router": Box(shape.HEAD, k, k, (shape.HEAD, shape.DEPTH)) if shape.ROUTER else None,
            "strip": Box(m, ranks, shape.STRIDE, (BLOCK_M, shape.BLOCK_R)),
            "up": Box(n, ranks, shape.STRIDE, (BLOCK_N, shape.BLOCK_R)),
            "y": Box(m, n, n, (shape.HALF_M, shape.PIECE)),
        },
        WARPS,
        weights=tuple(weights),
        M=m,
        slack=slack_of(m, programs(x.device), shape),
        S=Constants(shape),
    )
    flags = FORWARD_FLAGS.value + triton.cdiv(m, BLOCK_M)

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None, branches: Branches
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        side, up = pack(x, branches)
        words = mask(branches.seed) if mask else None  # type: ignore[arg-type]
        y, low = x.new_empty(m, n), x.new_empty(m, ranks)
        gated = x.new_empty(m, shape.STRIDE)
        gates = x.new_empty(m, shape.E, dtype=torch.float32) if shape.GATED else None
        router = side if shape.ROUTER else None
        counts = counters(x.device, flags)
        launch(x, weight, x, side, router, gated, up, y, bias, gated, low, gates, words, counts)
        return y, low, gates, side, up

    return run


def backward_shape(weight: Tensor, branches: Branches, needs: Sequence[bool]) -> Backward:
    """`needs` as in `fused.backward`."""
    count, edges = len(branches.downs), edges_of(branches)
    downs, ups = (_wanted(edges, each) for each in (needs[2 : 2 + count], needs[2 + count :]))
    gated, dropout = branches.mixer is not None, branches.threshold > 0
    turned = stored(weight) is not weight
    n, k = weight.shape
    return Backward(n, k, edges, gated, needs[1], downs, ups, dropout, turned)


def _wanted(edges: tuple[int, ...], needs: Sequence[bool]) -> tuple[int, int]:
    """From the first wanted adapter's first rank to the last one's end."""
    wanted = [e for e, need in enumerate(needs) if need]
    return (edges[wanted[0]], edges[wanted[-1] + 1]) if wanted else (0, 0)


def mixing_backward(
    dy: Tensor, x: Tensor, weight: Tensor, branches: Branches, shape: Backward,
    weights: Sequence[float], dtype: torch.dtype,
) -> Callable[..., tuple[Tensor, Tensor | None]]:  # fmt: skip
    """Plans dX [M, K] and, in `dtype`, one after the other, flat: dG [E, K] if wanted, dA of the
    ranks from the first wanted on [ranks, K], s dB_e [N, r_e] of them; or None.

    It is of dY, x, W, P, the gates, the branches, and side and up where the forward has kept them.
    """
    (m, n), k = dy.shape, shape.K
    ranks, rows = shape.RANKS, stored(weight)
    wide = (BLOCK_N, BLOCK_K) if shape.OUT_MAJOR else (BLOCK_K, BLOCK_N)
    pack = siding(n, k, x.dtype, shape.EDGES, branches)
    mask = masking(m, k, branches.threshold) if shape.DROPOUT else None
    sum_x, sum_y = shape.WIDTH_X > 0, shape.WIDTH_Y > 0
    few = shape.UPS[1] - shape.UPS[0]
    order = order_of(m, programs(dy.device), shape)
    launch = Launch(
        _hopper_backward,
        (programs(dy.device),),
        (
            *("dy", "weight", "dy_rows", "up", "strip", "side"),
            *("x_columns", "strip_rows", "dy_columns", "gated_rows", "dx"),
            *("made", "gated", "partial", "parts", "out", "low", "gates", "words", "counts"),
        ),
        {
            "dy": Box(m, n, dy.stride(0), (BLOCK_M, BLOCK_K)),
            "weight": Box(rows.shape[0], rows.shape[1], rows.stride(0), wide),
            "dy_rows": Box(m, n, dy.stride(0), (BLOCK_M, shape.DEPTH)),
            "up": Box(n, ranks, rounded_up(ranks), (shape.DEPTH, shape.WIDTH)),
            "strip": Box(m, shape.SIDE, shape.STRIDE, (BLOCK_M, shape.BLOCK_S)),
            "side": Box(shape.SIDE, k, k, (shape.BLOCK_S, BLOCK_N)),
            "x_columns": Box(m, k, x.stride(0), (shape.ROWS_X, COLUMNS)),
            "strip_rows": Box(m, shape.SIDE, shape.STRIDE, (shape.ROWS_X, shape.WIDTH_X)),
            "dy_columns": Box(m, n, dy.stride(0), (shape.ROWS_Y, COLUMNS)),
            "gated_rows": Box(m, few, shape.STRIDE_UP, (shape.ROWS_Y, shape.WIDTH_Y)),
            "dx": Box(m, k, k, (shape.HALF_M, shape.PIECE)),
        },
        WARPS,
        weights=tuple(weights),
        scaling=float(branches.scaling),
        M=m,
        **order,
        S=Constants(shape),
    )
    flags = BACKWARD_FLAGS.value + 3 * triton.cdiv(m, BLOCK_M) + 2 * shape.PIECES
    sizes = order["shares"] * shape.PIECES * COLUMNS * shape.MOST
    parted = shape.GATED and shape.MAKERS > 1
    length = shape.BELOW * k + few * n

    def run(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        low: Tensor,
        gates: Tensor | None,
        branches: Branches,
        side: Tensor | None,
        up: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        if side is None or up is None or side.dim() == 1:  # kept by another schedule
            side, up = pack(x, branches)
        words = mask(branches.seed) if mask else None  # type: ignore[arg-type]
        single, new = torch.float32, dy.new_empty
        dx, strip = new(m, k), new(m, shape.STRIDE)
        gated = new(m, shape.STRIDE_UP) if sum_y else None
        partial = new(m, shape.MAKERS, shape.E, dtype=single) if parted else None
        parts = new(sizes, dtype=single) if sizes else None
        out = new(length, dtype=dtype) if sizes else None
        launch(
            dy, weight, dy, up, strip, side, x if sum_x else None, strip if sum_x else None,
            dy if sum_y else None, gated, dx, strip, gated, partial, parts, out, low, gates, words,
            counters(dy.device, flags),
        )  # fmt: skip
        return dx, out

    return run

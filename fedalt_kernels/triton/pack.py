"""All adapters and the mixer laid side by side, in x's dtype, in one launch."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .primitives import LOGITS, down_pointers, mixer_rows, store_block, up_pointers
from .tiles import Ranks, precision

BLOCK = 128
BLOCK_R = 16


@triton.jit
def _pack(
    downs,
    ups,
    mixer,
    down,
    router,
    up,
    scaling,
    K: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    TILES_K: tl.constexpr = (K + BLOCK - 1) // BLOCK
    if program < TILES_K:
        k = program * BLOCK
        o_k = k + tl.arange(0, BLOCK)
        for rank in tl.range(0, RANKS, BLOCK_R):
            o_rank = rank + tl.arange(0, BLOCK_R)
            p_down = down_pointers(downs, o_rank, K, E, EDGES)[:, None] + o_k[None, :]
            m_down = (o_rank < EDGES[E])[:, None] & (o_k < K)[None, :]
            b_down = tl.load(p_down, mask=m_down, other=0.0).to(tl.float32)
            store_block(down, b_down, rank, k, RANKS, K, K, BLOCK_R, BLOCK, False, PRECISION)
        if GATED:
            b_router = mixer_rows(mixer, k, K, BLOCK, E, router.dtype.element_ty, PRECISION)
            store_block(
                router, b_router.to(tl.float32), 0, k, LOGITS, K, K, LOGITS, BLOCK, False, PRECISION
            )
    else:
        n = (program - TILES_K) * BLOCK
        o_n = n + tl.arange(0, BLOCK)
        for rank in tl.range(0, RANKS, BLOCK_R):
            o_rank = rank + tl.arange(0, BLOCK_R)
            p_up = up_pointers(ups, o_n, o_rank, E, EDGES)
            m_up = (o_n < N)[:, None] & (o_rank < EDGES[E])[None, :]
            b_up = tl.load(p_up, mask=m_up, other=0.0).to(tl.float32) * scaling
            store_block(up, b_up, n, rank, N, RANKS, RANKS, BLOCK, BLOCK_R, False, PRECISION)


def pack(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    mixer: Tensor | None,
    scaling: float,
    ranks: Ranks,
    down: Tensor,
    router: Tensor | None,
    up: Tensor,
) -> None:
    """Fills down [RANKS, K], router [16, K] and up = s B [N, RANKS], zero where nothing is.

    All in x's dtype.  s goes into up, where it cannot overflow float16 as it could in S.

    Args:
        downs, ups: E of A_e [r_e, K] and of B_e [N, r_e], contiguous and of one dtype.
        mixer: [E, K], contiguous, or None, then there is no router.
    """
    k, n = down.shape[1], up.shape[0]
    grid = (triton.cdiv(k, BLOCK) + triton.cdiv(n, BLOCK),)
    _pack[grid](
        downs=tuple(downs),
        ups=tuple(ups),
        mixer=mixer,
        down=down,
        router=router,
        up=up,
        scaling=float(scaling),
        K=k,
        N=n,
        E=len(downs),
        EDGES=ranks.edges,
        RANKS=ranks.padded,
        BLOCK=BLOCK,
        BLOCK_R=BLOCK_R,
        GATED=mixer is not None,
        PRECISION=precision(down.dtype),
    )

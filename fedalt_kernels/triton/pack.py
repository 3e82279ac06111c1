"""All adapters and mixers of layers laid side by side, in x's dtype, in one launch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adapter import Branches, Factors
from .launch import Launch
from .primitives import LOGITS, down_pointers, mixer_rows, store_block, up_pointers
from .tiles import Ranks, precision

BLOCK = 128
BLOCK_R = 16


@triton.jit
def _pack(
    downs,
    ups,
    mixers,
    packed,
    scaling,
    K: tl.constexpr,
    NS: tl.constexpr,
    E: tl.constexpr,
    EDGES: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One column of programs a layer; of `packed`, the parts are those of `packing`, in order."""
    LAYERS: tl.constexpr = len(NS)
    router = packed + LAYERS * RANKS * K
    up = router + LAYERS * LOGITS * K if GATED else router
    for layer in tl.static_range(LAYERS):
        if tl.program_id(1) == layer:
            _pack_layer(
                downs[layer * E : (layer + 1) * E],
                ups[layer * E : (layer + 1) * E],
                mixers[layer] if GATED else None,
                packed + layer * RANKS * K,
                router + layer * LOGITS * K,
                up,
                scaling,
                K,
                NS[layer],
                E,
                EDGES,
                RANKS,
                BLOCK,
                BLOCK_R,
                GATED,
                PRECISION,
            )
        up += NS[layer] * RANKS


@triton.jit
def _pack_layer(
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
    elif (program - TILES_K) * BLOCK < N:
        n = (program - TILES_K) * BLOCK
        o_n = n + tl.arange(0, BLOCK)
        for rank in tl.range(0, RANKS, BLOCK_R):
            o_rank = rank + tl.arange(0, BLOCK_R)
            p_up = up_pointers(ups, o_n, o_rank, E, EDGES)
            m_up = (o_n < N)[:, None] & (o_rank < EDGES[E])[None, :]
            b_up = tl.load(p_up, mask=m_up, other=0.0).to(tl.float32) * scaling
            store_block(up, b_up, n, rank, N, RANKS, RANKS, BLOCK, BLOCK_R, False, PRECISION)


class Packed(NamedTuple):
    """The adapters of L layers that read one x, side by side in x's dtype; each tensor is flat.

    Those of all layers lie behind one another from the first tensor of each kind on.
    """

    downs: Sequence[Tensor]  # L of [RANKS, K]
    routers: Sequence[Tensor | None]  # L of [16, K]
    ups: Sequence[Tensor]  # L of s B [N, RANKS]: in S, s could overflow float16

    def of(self, layer: int) -> tuple[Tensor, Tensor | None, Tensor]:
        return self.downs[layer], self.routers[layer], self.ups[layer]


def packing(
    x: Tensor, outputs: Sequence[int], first: Branches, ranks: Ranks
) -> Callable[[Tensor, Sequence[Branches]], Packed]:
    """Plans to fill a `Packed` of layers like the first, zero where nothing is.

    The layers may differ in their outputs and in values; scaling is the first one's.
    """
    k, count, gated = x.shape[1], len(outputs), first.mixer is not None
    narrow = [ranks.padded * k] * count + [LOGITS.value * k] * (count * gated)
    sizes = [*narrow, *(n * ranks.padded for n in outputs)]
    total, mixed = sum(sizes), are_mixed(first)
    launch = Launch(
        _pack,
        (triton.cdiv(k, BLOCK) + triton.cdiv(max(outputs), BLOCK), count),
        ("downs", "ups", "mixers", "packed"),
        scaling=float(first.scaling),
        K=k,
        NS=tuple(outputs),
        E=len(first.downs),
        EDGES=ranks.edges,
        RANKS=ranks.padded,
        BLOCK=BLOCK,
        BLOCK_R=BLOCK_R,
        GATED=gated,
        PRECISION=precision(x.dtype),
    )

    def run(x: Tensor, layers: Sequence[Branches]) -> Packed:
        packed = x.new_empty(total)
        downs = sources([a for branches in layers for a in branches.downs], mixed)
        ups = sources([b for branches in layers for b in branches.ups], mixed)
        mixers = [branches.mixer for branches in layers if branches.mixer is not None]
        launch(downs, ups, sources(mixers, False) if gated else None, packed)
        parts = torch.split_with_sizes(packed, sizes)
        routers = parts[count:-count] or (None,) * count
        return Packed(parts[:count], routers, parts[-count:])

    return run


def are_mixed(branches: Branches) -> bool:
    """Whether the adapters are of more than one dtype."""
    return len({factor.dtype for factor in (*branches.downs, *branches.ups)}) > 1


def sources(factors: Factors, mixed: bool) -> tuple[Tensor, ...]:
    """Factors as kernels read them: contiguous, and of one dtype, also where theirs are mixed."""
    return tuple([(factor.float() if mixed else factor).contiguous() for factor in factors])

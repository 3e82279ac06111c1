"""The derivative of the mixed layer, and what is kept for it.

Symbols as in `reference.py`; ⟨ , ⟩ is a row-wise inner product, ⊙ elementwise, m the 0/1 dropout
mask, and s = scaling includes the mask's keep scale, so that x~ = m ⊙ x here.

Forward::

    g = softmax(x Gᵀ)      [M, E]        P_e = x~ A_eᵀ      [M, r_e]
    S_e = g_e P_e          [M, r_e]      y = x Wᵀ + b + s Σ_e S_e B_eᵀ

A gate is one scalar a token, so it commutes with B_e and is applied in rank space.

Backward, with dY [M, N].  Differentiate y in S_e, then S_e in its two factors::

    T_e  = dY B_e                        [M, r_e]
    dP_e = g_e T_e                       [M, r_e]      times s
    dg_e = ⟨T_e, P_e⟩                    [M]           times s
    dl   = g ⊙ (dg − Σ_e g_e dg_e)       [M, E]        times s, the softmax's Jacobian

    dX   = dY W + s (m ⊙ Σ_e dP_e A_e) + s dl G        [M, K]
    dA_e = s dP_eᵀ x~      [r_e, K]      dB_e = s dYᵀ S_e   [N, r_e]      dG = s dlᵀ x   [E, K]

s is applied once, to small matrices.  A frozen adapter gets no dA_e and dB_e, but its T_e still
carries gradient to x and to the mixer.

Kept for the backward: x and the parameters (alive anyway), P in x's dtype, g in float32 (float64
for float64 x) and the seed: M (itemsize Σ r_e + 4 E) bytes beside x, and 8 for the seed.  Nothing
of size [M, N], no dropped copy of x and no mask.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import merged, operators
from .adapter import Adapter


class MixedLoRA(torch.autograd.Function):
    """The equations above, over x of any leading shape; `fused` is its typed form."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mixer: Tensor | None,
        seed: Tensor | None,
        weights: tuple[float, ...] | None,
        scaling: float,
        threshold: int,
        *factors: Tensor,
    ) -> Tensor:
        count = len(factors) // 2
        branches = merged.Branches(
            factors[:count], factors[count:], mixer, weights, scaling, threshold, seed
        )
        n, k = weight.shape
        rows = x.reshape(-1, k)
        forward = operators.merged_forward if torch.compiler.is_compiling() else merged.forward
        y, low, gates = forward(rows, weight, bias, branches)
        ctx.save_for_backward(x, weight, low, gates, mixer, seed, *factors)
        ctx.constants = weights, scaling, threshold
        return y.view(*x.shape[:-1], n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, low, gates, mixer, seed, *factors = ctx.saved_tensors
        count = len(factors) // 2
        weights, scaling, threshold = ctx.constants
        branches = merged.Branches(
            factors[:count], factors[count:], mixer, weights, scaling, threshold, seed
        )
        n, k = weight.shape
        asked = ctx.needs_input_grad
        needs = [asked[0], asked[3], *asked[8:]]
        backward = operators.merged_backward if torch.compiler.is_compiling() else merged.backward
        rows, drows = x.reshape(-1, k), dy.reshape(-1, n).contiguous()
        # Autocast would change the dtype of some of these products under an in-place sum.
        with torch.autocast(x.device.type, enabled=False):
            grads = iter(backward(drows, rows, weight, low, gates, branches, needs))
        dx, dmixer, *dfactors = [next(grads) if need else None for need in needs]
        if dx is not None:
            dx = dx.view(x.shape)
        return dx, None, None, dmixer, None, None, None, None, *dfactors


def fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    mixer: Tensor | tuple[float, ...] | None,
    scaling: float,
    threshold: int,
    seed: Tensor | None,
) -> Tensor:
    """Arguments as in `fedalt_kernels.mixed_lora_linear`, already checked.

    Args:
        scaling: s above, the keep scale included.
        threshold: see `dropout.drop_threshold`; 0 for no dropout.
        seed: int64 [], or None without dropout.
    """
    learned = isinstance(mixer, Tensor)
    return MixedLoRA.apply(
        x,
        weight,
        bias,
        mixer if learned else None,
        seed,
        None if learned else mixer,
        scaling,
        threshold,
        *[a for a, _ in adapters],
        *[b for _, b in adapters],
    )

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
for float64 x) and the seed: M (itemsize Σ r_e + 4 E) bytes beside x, and 8 for the seed; the Triton
path keeps its packed adapters too, about (Σ r_e + 16) (K + N) numbers in x's dtype.  Nothing of
size [M, N], no dropped copy of x and no mask.  Of a quantized W only its packed tensors are kept;
it is dequantized again.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import operators
from .adapter import Adapter, Branches, Factors, rows_of
from .choice import plain
from .dispatch import undifferentiated
from .dropout import keep_scale
from .quantized import QuantizedWeight
from .reference import reference


class Call(NamedTuple):
    """What a call takes beside the tensors that may want a gradient."""

    constants: tuple[Any, ...]  # of its kind, see `kinds.Kind`
    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    seed: Tensor | None
    strip: Any


class MixedLoRA(torch.autograd.Function):
    """The equations above, over x of any leading shape; `mixed_lora` is its typed form."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, mixer: Tensor | None, *factors: Tensor) -> Tensor:
        weight, seed = call.weight, call.seed
        ctx.constants = call.constants
        y, (low, gates, *more) = _forward(call, x, mixer, factors)
        base = (weight,) if isinstance(weight, Tensor) else weight.tensors
        ctx.save_for_backward(x, low, gates, mixer, seed, *factors, *base, *more)
        ctx.base_end = len(factors) + len(base)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and _is_transformed(dy):
            return _backward_of_reference(ctx, dy)
        x, low, gates, mixer, seed, factors, base, more = _saved(ctx)
        branches = _branches(ctx.constants, mixer, seed, factors)
        needs = ctx.needs_input_grad[1:]
        _, backward = _implementation(ctx.constants[0])
        with without_autocast(x.device.type), undifferentiated():
            drows = dy.reshape(-1, base.shape[0]).contiguous()
            grads = iter(backward(drows, rows_of(x), base, low, gates, branches, needs, *more))
            dx, *others = [next(grads) if need else None for need in needs]
            return None, None if dx is None else dx.view(x.shape), *others


# PyTorch's own `apply` in C; the one in Python looks for what only torch.func's transforms leave.
_apply = super(torch.autograd.Function, MixedLoRA).apply


def _forward(
    call: Call, x: Tensor, mixer: Tensor | None, factors: Factors
) -> tuple[Tensor, Sequence[Any]]:
    """y, and what the implementation returns beside it: P, the gates, what its backward can use."""
    constants, weight, bias, seed, strip = call
    forward, _ = _implementation(constants[0])
    branches = _branches(constants, mixer, seed, factors)
    made = () if strip is None else (strip,)
    with undifferentiated():
        y, *rest = forward(rows_of(x), weight, bias, branches, *made)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]), rest


def _saved(ctx: Any) -> tuple[Any, ...]:
    """x, P, the gates, the mixer, the seed, the factors, the base weight, and what is left."""
    x, low, gates, mixer, seed, *rest = ctx.saved_tensors
    _, count, *_, layout, _ = ctx.constants
    base: Any = rest[2 * count]
    if layout is not None:
        kind, shape, blocks = layout
        base = QuantizedWeight(kind, shape, tuple(rest[2 * count : ctx.base_end]), blocks)
    return x, low, gates, mixer, seed, rest[: 2 * count], base, rest[ctx.base_end :]


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast would change the dtype of some of these products under an in-place sum."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _is_transformed(dy: Tensor) -> bool:
    """Whether a backward is itself differentiated, or batched as by ``is_grads_batched``."""
    batched = torch._C._functorch.is_legacy_batchedtensor(dy)
    return torch.is_grad_enabled() or batched or plain(dy)


def _backward_of_reference(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The backward as PyTorch's own operations, to be differentiated again or batched by vmap."""
    x, _, _, mixer, seed, factors, base, _ = _saved(ctx)
    _, count, weights, scaling, threshold, *_ = ctx.constants
    downs, ups = factors[:count], factors[count:]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        y = reference(
            x,
            base if isinstance(base, Tensor) else base.dequantize(x.dtype),
            None,
            [Adapter(a, b) for a, b in zip(downs, ups, strict=True)],
            weights if mixer is None else mixer,
            scaling=scaling / keep_scale(threshold),
            dropout_p=threshold / 256,
            seed=seed,
        )
    inputs = (None, x, mixer, *factors)
    asked = [i for i, need in enumerate(ctx.needs_input_grad) if need]
    wanted = [inputs[i] for i in asked]
    found = torch.autograd.grad(y, wanted, dy, create_graph=torch.is_grad_enabled())
    grads = dict(zip(asked, found, strict=True))
    return tuple(grads.get(i) for i in range(len(inputs)))


def _branches(
    constants: tuple[Any, ...], mixer: Tensor | None, seed: Tensor | None, factors: Factors
) -> Branches:
    _, count, weights, scaling, threshold, schedule, _, kind = constants
    downs, ups = factors[:count], factors[count:]
    return Branches(downs, ups, mixer, weights, scaling, threshold, seed, schedule, kind)


def _implementation(impl: str) -> tuple[Any, Any]:
    """Forward and backward of "torch" or "triton", as operators where torch.compile is tracing."""
    if torch.compiler.is_compiling():
        return operators.OPERATORS[impl]
    module = operators.module(impl)
    return module.forward, module.backward


def mixed_lora(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    mixer: Tensor | tuple[float, ...] | None,
    seed: Tensor | None,
    constants: tuple[Any, ...],
    strip: Any,
) -> Tensor:
    """Arguments as in `fedalt_kernels.mixed_lora_linear`, already checked.

    Args:
        seed: int64 [], or None without dropout.
        constants: of the kind of call, from `kinds.find`; their scaling is s above, the keep scale
            included.
    """
    learned = mixer if isinstance(mixer, Tensor) else None
    factors = [a for a, _ in adapters] + [b for _, b in adapters]
    call = Call(constants, weight, bias, seed, strip)
    if torch.compiler.is_compiling():
        return MixedLoRA.apply(call, x, learned, *factors)
    if torch.is_grad_enabled():
        return _apply(call, x, learned, *factors)
    y, _ = _forward(call, x, learned, factors)
    return y

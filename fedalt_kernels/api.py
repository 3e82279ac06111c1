"""The functional form: picks the implementation of the checked arguments."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .autograd import mixed_lora
from .checks import check_seed, check_tensors
from .choice import plain
from .dropout import draw_seed
from .kinds import find
from .quantized import QuantizedWeight
from .reference import reference


def mixed_lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    mixer: Tensor | tuple[float, ...] | None,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    impl: str = "auto",
    schedule: str | None = None,
    strip: Any = None,
) -> Tensor:
    """A frozen linear layer plus gated low-rank adapters, differentiable.

    ::

        y = x Wᵀ + b + s Σ_e g_e ⊙ (dropout(x) A_eᵀ) B_eᵀ,    g = softmax(x mixerᵀ)

    M tokens (any leading dimensions, also none), K inputs, N outputs, E adapters, r_e their ranks.
    Under ``torch.autocast`` it behaves as ``nn.Linear`` does: it computes in the autocast dtype and
    returns it.  It can be differentiated again and again, and transformed by ``torch.func`` (grad,
    vmap, jvp, hessian): "reference" then serves it, whatever ``impl`` is, and where no seed is
    given draws its dropout as ``nn.Dropout`` does, by vmap's ``randomness``.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64.
        weight: [N, K], dtype and device of x, frozen; a transposed view is fine.  Or a
            `QuantizedWeight`, taken in x's dtype: computed in float32, then rounded once at most.
        bias: [N] or None, dtype and device of x, frozen.
        adapters: 1 to 8 of ``Adapter(a [r_e, K], b [N, r_e])``, in x's dtype or float32.
        mixer: Tensor [E, K], in x's dtype or float32: row e gates ``adapters[e]``; or a tuple of E
            fixed gates; or None, every gate 1.
        scaling: s, usually alpha / r.
        dropout_p: probability, in [0, 1), that an element of x is hidden from all the adapters; the
            mixer sees all of x.  Rounded to a multiple of 1/256, but never to 0 or 1.
        seed: of the dropout mask, which is a function of it and the element's row and column: an
            int in [0, 2**63) or an int64 tensor of shape [].  None draws one from torch's default
            generator of x's device.  Ignored without dropout.
        impl: "triton" (fused kernels), "torch" (merged matrix products), "reference" (slow and
            simple), or "auto": "triton" on a GPU that runs it, else "torch".
        schedule: with impl="triton", "decode", "recompute", "overlapped", "split", "expand" or
            "hopper", see `fedalt_kernels.fused`; None chooses by shape and device.
        strip: with the seed it was made for, what `sharing.SharedInput` has made of x already.

    Returns:
        [..., N] in x's dtype.  Gradients reach x, and every adapter and mixer that asks for one, in
        its own dtype; never the weight or the bias.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a shape, dtype, device or value does not fit, or the base asks for a gradient.
        RuntimeError: ``impl`` cannot run here, or ``schedule`` cannot serve these arguments.
    """
    check_tensors(x, weight, bias)
    if seed is not None:
        check_seed(seed)
    settings = scaling, dropout_p, impl, schedule
    plan = find(x, weight, bias, adapters, mixer, settings)
    if plan.dtype is not None:
        x, bias = x.to(plan.dtype), None if bias is None else bias.to(plan.dtype)
        weight = weight.to(plan.dtype) if isinstance(weight, Tensor) else weight
    if not plan.threshold or (seed is None and plan.impl == "reference" and plain(x)):
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    elif isinstance(seed, int):
        seed = torch.full((), seed, dtype=torch.int64, device=x.device)
    else:
        seed = seed.to(x.device)
    if plan.impl == "reference":
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize(x.dtype)
        return reference(
            x, weight, bias, adapters, mixer, scaling=scaling, dropout_p=dropout_p, seed=seed
        )
    return mixed_lora(x, weight, bias, adapters, mixer, seed, plan.constants, strip)

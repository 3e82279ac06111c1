"""The specification: the layer in plain PyTorch, differentiated by autograd.

Symbols (M tokens, K inputs, N outputs, E adapters, r_e the rank of adapter e; no units)::

    x    [M, K]     input                           dtype of x
    W    [N, K]     base weight, frozen             dtype of x
    b    [N]        base bias, frozen, optional     dtype of x
    A_e  [r_e, K]   down-projection                 taken in the dtype of x
    B_e  [N, r_e]   up-projection                   taken in the dtype of x
    G    [E, K]     mixer                           taken in the dtype of x
    s               scaling, alpha / r              Python float
    x~   [M, K]     dropout(x): kept elements over the probability of being kept
    g    [M, E]     gates                           float32 (float64 for float64 x)
    y    [M, N]     output                          dtype of x

    g = softmax(x Gᵀ)        one gate a token and adapter; the mixer sees x undropped
    y = x Wᵀ + b + s Σ_e g_e ⊙ (x~ A_eᵀ) B_eᵀ

All adapters share one dropout mask.  Everything else in this package is held to this file.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .dropout import drop_threshold, keep_mask, keep_scale
from .segments import Segments


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    mixer: Tensor | tuple[float, ...] | None,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """The equation above; arguments as in `fedalt_kernels.mixed_lora_linear`, already checked.

    x may have any number of leading dimensions; the mask counts rows over all of them.  Without a
    seed the mask is PyTorch's own.
    """
    dtype = x.dtype
    y = torch.nn.functional.linear(x, weight, bias)
    dropped = x
    threshold = drop_threshold(dropout_p)
    if threshold and seed is None:
        dropped = torch.nn.functional.dropout(x, threshold / 256)
    elif threshold and seed is not None:
        columns = x.shape[-1]
        keep = keep_mask(int(seed), x.shape[:-1].numel(), columns, threshold)
        dropped = torch.where(keep.to(x.device).view(x.shape), x, 0) * keep_scale(threshold)
    gates: Any  # E of: Tensor [..., 1], or float
    if isinstance(mixer, Tensor):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        gates = torch.softmax((x @ mixer.to(dtype).T).to(wide), dim=-1).unsqueeze(-1).unbind(-2)
    else:
        gates = (1.0,) * len(adapters) if mixer is None else mixer
    for gate, (a, b) in zip(gates, adapters, strict=True):
        low = dropped @ a.to(dtype).T
        gated = (low * gate).to(dtype)
        y = y + scaling * (gated @ b.to(dtype).T)
    return y


def grouped_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    mixer: Tensor | tuple[float, ...] | None,
    segments: Segments,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seeds: Tensor | None = None,
) -> Tensor:
    """Each client's rows by `reference`; as in `fedalt_kernels.mixed_lora_linear_grouped`.

    Args:
        segments: of the M rows of x.
        seeds: int64 [C].
    """
    rows = segments.sort(x.reshape(-1, x.shape[-1]))
    parts = [
        reference(
            part,
            weight,
            bias,
            [Adapter(a[c], b[c]) for a, b in adapters],
            mixer[c] if isinstance(mixer, Tensor) else mixer,
            scaling=scaling,
            dropout_p=dropout_p,
            seed=None if seeds is None else seeds[c],
        )
        for c, part in enumerate(rows.split(segments.sizes))
    ]
    return segments.restore(torch.cat(parts)).view(*x.shape[:-1], weight.shape[0])

"""`merged.py` as registered operators, which torch.compile calls without looking inside."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from . import merged
from .merged import Branches

_BRANCHES = (
    "Tensor[] downs, Tensor[] ups, Tensor? mixer, float[]? weights, float scaling, int threshold, "
    "Tensor? seed"
)
library.define(
    "fedalt_kernels::merged_forward",
    f"(Tensor x, Tensor weight, Tensor? bias, {_BRANCHES}) -> (Tensor y, Tensor low, Tensor gates)",
)
library.define(
    "fedalt_kernels::merged_backward",
    f"(Tensor dy, Tensor x, Tensor weight, Tensor low, Tensor gates, {_BRANCHES}, bool[] needs)"
    " -> Tensor[]",
)


def merged_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: Branches
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`merged.forward`, as one operator."""
    y, low, gates = torch.ops.fedalt_kernels.merged_forward(x, weight, bias, *branches)
    return y, low, gates if branches.mixer is not None else None


def merged_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    low: Tensor,
    gates: Tensor | None,
    branches: Branches,
    needs: Sequence[bool],
) -> list[Tensor]:
    """`merged.backward`, as one operator."""
    held = low.new_empty(0) if gates is None else gates
    return torch.ops.fedalt_kernels.merged_backward(dy, x, weight, low, held, *branches, needs)


@library.impl("fedalt_kernels::merged_forward", "CompositeExplicitAutograd")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *branches: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y, low, gates = merged.forward(x, weight, bias, Branches(*branches))
    return y, low, x.new_empty(0) if gates is None else gates


@library.impl("fedalt_kernels::merged_backward", "CompositeExplicitAutograd")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, low: Tensor, gates: Tensor, *rest: Any
) -> list[Tensor]:
    *branches, needs = rest
    mixed = Branches(*branches)
    held = None if mixed.mixer is None else gates
    grads = merged.backward(dy, x, weight, low, held, mixed, needs)
    # An operator's outputs must not share storage; gradients cut from one product do.
    return [
        grad if i == 0 and needs[0] else grad.clone(memory_format=torch.contiguous_format)
        for i, grad in enumerate(grads)
    ]


@library.register_fake("fedalt_kernels::merged_forward")
def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *branches: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mixed = Branches(*branches)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rank = sum(a.shape[0] for a in mixed.downs)
    y = x.new_empty(x.shape[0], weight.shape[0])
    low = x.new_empty(x.shape[0], rank)
    if mixed.mixer is None:
        return y, low, x.new_empty(0)
    return y, low, x.new_empty(x.shape[0], len(mixed.downs), dtype=wide)


@library.register_fake("fedalt_kernels::merged_backward")
def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, low: Tensor, gates: Tensor, *rest: Any
) -> list[Tensor]:
    *branches, needs = rest
    mixed = Branches(*branches)
    inputs = [x, mixed.mixer, *mixed.downs, *mixed.ups]
    return [
        torch.empty(source.shape, dtype=source.dtype, device=source.device)
        for source, need in zip(inputs, needs, strict=True)
        if need
    ]

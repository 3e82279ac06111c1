"""Both implementations as operators, which torch.compile calls without looking inside."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, library

from . import merged
from .adapter import Branches

_BRANCHES = (
    "Tensor[] downs, Tensor[] ups, Tensor? mixer, float[]? weights, float scaling, int threshold, "
    "Tensor? seed, str? schedule"
)
_FORWARD = (
    f"(Tensor x, Tensor weight, Tensor? bias, {_BRANCHES}) -> (Tensor y, Tensor low, Tensor gates)"
)
_BACKWARD = (
    f"(Tensor dy, Tensor x, Tensor weight, Tensor low, Tensor gates, {_BRANCHES}, bool[] needs)"
    " -> Tensor[]"
)
_NAMES = {"torch": "merged", "triton": "fused"}


def _module(impl: str) -> Any:
    if impl == "torch":
        return merged
    from . import fused  # only here, since it needs Triton

    return fused


def _run_forward(
    impl: str, x: Tensor, weight: Tensor, bias: Tensor | None, *branches: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y, low, gates = _module(impl).forward(x, weight, bias, Branches(*branches))
    return y, low, x.new_empty(0) if gates is None else gates


def _run_backward(
    impl: str, dy: Tensor, x: Tensor, weight: Tensor, low: Tensor, gates: Tensor, *rest: Any
) -> list[Tensor]:
    *branches, needs = rest
    mixed = Branches(*branches)
    held = None if mixed.mixer is None else gates
    grads = _module(impl).backward(dy, x, weight, low, held, mixed, needs)
    # An operator's outputs must not share storage; gradients cut from one product do.
    return [
        grad if i == 0 and needs[0] else grad.clone(memory_format=torch.contiguous_format)
        for i, grad in enumerate(grads)
    ]


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


def _forward(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, branches: Branches
) -> tuple[Tensor, Tensor, Tensor | None]:
    operator = getattr(torch.ops.fedalt_kernels, f"{name}_forward")
    y, low, gates = operator(x, weight, bias, *branches)
    return y, low, gates if branches.mixer is not None else None


def _backward(
    name: str,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    low: Tensor,
    gates: Tensor | None,
    branches: Branches,
    needs: Sequence[bool],
) -> list[Tensor]:
    operator = getattr(torch.ops.fedalt_kernels, f"{name}_backward")
    held = low.new_empty(0) if gates is None else gates
    return operator(dy, x, weight, low, held, *branches, needs)


def _register(impl: str, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    for half, schema, run, fake in (
        ("forward", _FORWARD, _run_forward, _fake_forward),
        ("backward", _BACKWARD, _run_backward, _fake_backward),
    ):
        operator = f"fedalt_kernels::{name}_{half}"
        library.define(operator, schema)
        library.impl(operator, "CompositeExplicitAutograd", partial(run, impl))
        library.register_fake(operator, fake)
    return partial(_forward, name), partial(_backward, name)


OPERATORS = {impl: _register(impl, name) for impl, name in _NAMES.items()}
"""Forward and backward of each implementation, with the signatures of `merged`."""

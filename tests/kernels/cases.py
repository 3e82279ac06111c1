"""Inputs of the layer, and one run of it forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedalt_kernels import Adapter

SCALING = 1.75
SEED = 20


@dataclass(frozen=True)
class Case:
    """M rows, K columns, N outputs; `gate` is "softmax", "fixed" or "none"."""

    m: int = 7
    n: int = 33
    k: int = 17
    ranks: tuple[int, ...] = (3, 3)
    gate: str = "softmax"
    dropout: float = 0.0
    frozen: tuple[int, ...] = ()
    bias: bool = True
    dtype: torch.dtype = torch.float64
    param_dtype: torch.dtype = torch.float64
    transposed: bool = False  # the weight is stored as [K, N]


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    adapters: tuple[Adapter, ...]
    mixer: Tensor | tuple[float, ...] | None
    dy: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """What may ask for a gradient, by name."""
        named = {"x": self.x}
        if isinstance(self.mixer, Tensor):
            named["mixer"] = self.mixer
        for e, (a, b) in enumerate(self.adapters):
            named |= {f"a{e}": a, f"b{e}": b}
        return named

    def in_float64(self) -> "Inputs":
        """The same values, exactly, in float64."""

        def widen(tensor: Tensor) -> Tensor:
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        return replace(
            self,
            x=widen(self.x),
            weight=widen(self.weight),
            bias=None if self.bias is None else widen(self.bias),
            adapters=tuple(Adapter(widen(a), widen(b)) for a, b in self.adapters),
            mixer=widen(self.mixer) if isinstance(self.mixer, Tensor) else self.mixer,
            dy=widen(self.dy),
        )


def build(case: Case, seed: int = 0, device: str = "cpu") -> Inputs:
    """Random inputs whose adapters and gates matter as much as the base product does."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, over: int = 1, base: bool = False, grad: bool = False) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) / over**0.5
        dtype = case.dtype if base else case.param_dtype
        return values.to(device, dtype).requires_grad_(grad)

    count = len(case.ranks)
    mixers = {
        "softmax": normal(count, case.k, over=case.k, grad=True),
        "fixed": tuple(0.5 + 0.25 * e for e in range(count)),
        "none": None,
    }
    return Inputs(
        x=normal(case.m, case.k, base=True, grad=True),
        weight=_stored(normal(case.n, case.k, over=case.k, base=True), case.transposed),
        bias=normal(case.n, base=True) if case.bias else None,
        adapters=tuple(
            Adapter(
                normal(rank, case.k, over=case.k, grad=e not in case.frozen),
                normal(case.n, rank, over=rank, grad=e not in case.frozen),
            )
            for e, rank in enumerate(case.ranks)
        ),
        mixer=mixers[case.gate],
        dy=normal(case.m, case.n, base=True),
    )


def _stored(weight: Tensor, transposed: bool) -> Tensor:
    return weight.t().contiguous().t() if transposed else weight


def apply(
    function: Callable[..., Tensor], inputs: Inputs, dropout: float, seed: int | None = SEED
) -> Tensor:
    """The output."""
    return function(
        inputs.x,
        inputs.weight,
        inputs.bias,
        inputs.adapters,
        inputs.mixer,
        scaling=SCALING,
        dropout_p=dropout,
        seed=seed,
    )


def run(function: Callable[..., Tensor], inputs: Inputs, dropout: float) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    named = {name: each for name, each in inputs.tensors().items() if each.requires_grad}
    y = apply(function, inputs, dropout)
    grads = torch.autograd.grad(y, list(named.values()), inputs.dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(named, grads, strict=True)}

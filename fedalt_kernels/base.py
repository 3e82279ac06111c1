"""What the modules share: a frozen base layer, whichever way its weight is stored, and adapters."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from .checks import check_quantized, stores_transposed
from .quantized import QuantizedWeight, storage_of


class FrozenBase(nn.Module):
    """Holds a linear layer as ``base``, and its weight as the layer's functional form takes it.

    Raises:
        TypeError, ValueError: the base is none that `MixedLoRALinear` takes.
    """

    base: nn.Linear  # or one of the others

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.quantized = storage_of(base) != ""
        self.transposed = not self.quantized and stores_transposed(base)
        self.base = cast("nn.Linear", base)
        weight = self.weight
        if isinstance(weight, QuantizedWeight):
            check_quantized(weight, weight.device)

    @property
    def weight(self) -> Tensor | QuantizedWeight:
        """The base weight [N, K], whichever way it is stored."""
        base = self._modules["base"]
        if self.quantized:
            return QuantizedWeight.of(base)  # anew, since `.to` gives it other tensors
        weight = self._owned("base")["weight"]
        return weight.t() if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias [N], or None."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """K"""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """N"""
        return self.weight.shape[0]

    def _owned(self, name: str) -> dict[str, Any]:
        """A child's own parameters, read several times faster than by nn.Module.__getattr__."""
        return self._modules[name]._parameters  # type: ignore[union-attr]


class LowRank(nn.Module):
    """The factors of one adapter: ``a`` [rank, K] and ``b`` [N, rank], or stacked."""

    def __init__(self, a: Tensor, b: Tensor, *, trainable: bool) -> None:
        super().__init__()
        self.a = nn.Parameter(a, requires_grad=trainable)
        self.b = nn.Parameter(b, requires_grad=trainable)


def kaiming_uniform_(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Draws on the generator's device, so that a seed gives the same values on every device."""
    drawn = torch.empty_like(tensor, device=generator.device if generator else tensor.device)
    tensor.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))

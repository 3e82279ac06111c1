"""A frozen linear layer whose weight is kept in eight bits of floating point."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .quantized import QuantizedWeight, dense

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class _Product(torch.autograd.Function):
    """x Wᵀ + bias that keeps the packed weight for dX = dY W, and not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(data, scale)
        return nn.functional.linear(x, _matrix(data, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        data, scale = ctx.saved_tensors
        return dy @ _matrix(data, scale, dy.dtype), None, None, None


def _matrix(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    n, k = data.shape
    weight = QuantizedWeight("fp8", (n, k), (data, scale))
    return weight.dequantize(dtype) if torch.compiler.is_compiling() else dense(weight, dtype)


class Fp8Linear(nn.Module):
    """A frozen linear layer with an e4m3 weight and one scale a row, half the size of bfloat16::

        y = x Wᵀ + bias,    W[n, k] = weight[n, k] scale[n],    scale[n] = max_k |W₀[n, k]| / 448

    ``weight`` is float8_e4m3fn [N, K], ``scale`` float32 [N], ``bias`` [N] or None in the dtype it
    came in.  x may be of any floating-point dtype; W and the bias are taken in it.
    """

    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        frozen = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", frozen)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> "Fp8Linear":
        """Rounds a linear layer's weight to the nearest e4m3 multiple of its row's scale.

        Raises:
            TypeError: `linear` is no ``nn.Linear``, or its weight is not floating point.
            ValueError: its weight is not finite.
        """
        if not isinstance(linear, nn.Linear) or not linear.weight.dtype.is_floating_point:
            raise TypeError(f"linear must be an nn.Linear of floats, got {type(linear).__name__}")
        wide = linear.weight.float()
        largest = wide.abs().amax(1)
        if not largest.isfinite().all():
            raise ValueError("linear.weight must be finite")
        scale = largest / LARGEST
        scale = torch.where(scale > 0, scale, 1.0)  # of zeros, or of what is as good as that
        # The quotient of a largest element may have been rounded beyond what e4m3 holds.
        scaled = (wide / scale.unsqueeze(1)).clamp(-LARGEST, LARGEST)
        return cls(scaled.to(torch.float8_e4m3fn), scale, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product.apply(x, self.weight, self.scale, bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "Fp8Linear":
        """Moves it, but leaves weight and scales in the dtypes that they are stored in."""
        data, scale = self.weight.data, self.scale
        super()._apply(fn, recurse)
        self.weight.data = data.to(self.weight.device)
        self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        n, k = self.weight.shape
        return f"in_features={k}, out_features={n}, bias={self.bias is not None}"

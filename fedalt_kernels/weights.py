"""A base weight as the Triton kernels take it: a matrix, written out if need be, or its bytes."""

from typing import NamedTuple

import torch
from torch import Tensor

from .quantized import INT8_RANGE, QuantizedWeight, workspace
from .triton.dequantize import dequantize


class Octets(NamedTuple):
    """A quantized weight whose blocks and bytes end with its rows, as `decode` reads it."""

    data: Tensor  # [N, bytes of a row]; fp8 as uint8, of which a masked load can make zeros
    statistics: tuple[Tensor, ...]
    blocks: tuple[int, ...]
    divisor: float


def octets(weight: QuantizedWeight) -> Octets | None:
    """None where a block or a byte crosses rows."""
    n, k = weight.shape
    if weight.blocks and k % weight.blocks[0]:
        return None
    data, *statistics = _tensors(weight)
    return Octets(data.view(n, -1), tuple(statistics), weight.blocks, _divisor(weight))


def matrix(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight itself, or written out where the next one will be."""
    if isinstance(weight, Tensor):
        return weight
    target = workspace(weight, dtype)
    if weight.kind == "fp8" and torch.version.hip is not None:  # whose own fp8 is another one
        return weight.dequantize(dtype, target)
    return dequantize(_tensors(weight), weight.blocks, _divisor(weight), target)


def outline(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """A matrix of the same shape and alignment, by which a schedule can be chosen."""
    if isinstance(weight, Tensor):
        return weight
    return torch.empty(weight.shape, dtype=dtype, device="meta")


def _tensors(weight: QuantizedWeight) -> list[Tensor]:
    data, *statistics = weight.tensors
    return [data.view(torch.uint8) if weight.kind == "fp8" else data, *statistics]


def _divisor(weight: QuantizedWeight) -> float:
    return float(INT8_RANGE) if weight.kind == "int8" else 1.0

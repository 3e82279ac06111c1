"""What is settled once for every kind of call: whether its arguments fit, and what serves it."""

from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter
from .checks import check_arguments
from .choice import implementation, plain
from .dropout import drop_threshold, keep_scale
from .plans import Plans
from .quantized import QuantizedWeight


class Kind(NamedTuple):
    """How a call is served."""

    dtype: torch.dtype | None  # of autocast, to which x, weight and bias go first
    impl: str  # "torch", "triton" or "reference"
    threshold: int  # see `dropout.drop_threshold`
    constants: tuple[Any, ...]  # of `autograd.MixedLoRA`


_kinds: Plans[Kind] = Plans()
_of = attrgetter("shape", "dtype", "device", "requires_grad")


def find(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    mixer: Tensor | tuple[float, ...] | None,
    settings: tuple[float, float, str, str | None],
) -> Kind:
    """The kind of a call, checked when it is first seen.

    Args:
        settings: scaling, dropout_p, impl and schedule; all as in `mixed_lora_linear`.

    Raises:
        TypeError, ValueError, RuntimeError: as `check_arguments` and `implementation`.
    """
    # A compiler traces the checks once, and keeps guards of its own.
    if torch.compiler.is_compiling() or plain(x):
        return _settle(x, weight, bias, adapters, mixer, settings)
    try:
        gates = _of(mixer) if isinstance(mixer, Tensor) else mixer
        pairs = [(type(pair), *map(_of, pair)) for pair in adapters]
        bound = None if bias is None else _of(bias)
        key = _of_input(x), _of_base(weight), bound, gates, settings, *pairs
        found = _kinds.get(key)
    except (AttributeError, IndexError, TypeError):  # one of them is not what it should be
        return _settle(x, weight, bias, adapters, mixer, settings)
    return found or _kinds.made(
        key, lambda: _settle(x, weight, bias, adapters, mixer, settings, object())
    )


def _of_input(x: Tensor) -> tuple[Any, ...]:
    return x.shape[-1], x.dtype, x.device, x.numel() == 0, _autocast_dtype(x.device.type)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on a kind of device; None where it is off or unknown."""
    on = _knows_autocast(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)  # "meta", for one, does not


# As in `choice`: PyTorch 2.11 cannot compile it, and would look through a cache.
_knows_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _of_base(weight: Tensor | QuantizedWeight) -> tuple[Any, ...]:
    if isinstance(weight, Tensor):
        return _of(weight), weight.stride()
    tensors = [(_of(tensor), tensor.is_contiguous()) for tensor in weight.tensors]
    return weight.kind, weight.shape, weight.blocks, *tensors


def _settle(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    mixer: Tensor | tuple[float, ...] | None,
    settings: tuple[float, float, str, str | None],
    name: Hashable = None,
) -> Kind:
    """The kind of a call, which other plans know by its name where it has one."""
    dtype = None if x.dtype == torch.float64 else _autocast_dtype(x.device.type)
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
    scaling, dropout_p, impl, schedule = settings
    check_arguments(x, weight, bias, adapters, mixer, scaling, dropout_p, impl, schedule)
    threshold = drop_threshold(dropout_p)
    impl = implementation(impl, x, weight)
    if threshold:
        scaling *= keep_scale(threshold)
    weights = None if isinstance(mixer, Tensor) else mixer
    layout = None
    if isinstance(weight, QuantizedWeight):
        layout = weight.kind, weight.shape, weight.blocks
    constants = impl, len(adapters), weights, scaling, threshold, schedule, layout, name
    return Kind(dtype, impl, threshold, constants)

"""Every row of a batch with its own copy of the adapters, for gradients by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedalt.model.grouped import HiddenRows
from fedalt.model.states import State, mixed_layers
from fedalt_kernels import Adapter, MixedLoRALinear, Segments, apply_stacked

BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that depend on a batch's longest text."""


def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether nothing that is known lets a record of a batch change what another one gives."""
    return not any(
        isinstance(module, _BatchNorm)
        or any(kind in str(getattr(module, "rope_type", "")) for kind in BY_LENGTH)
        for module in model.modules()
    )


@contextmanager
def own_adapters(model: nn.Module, rows: int) -> Iterator[State]:
    """While it lasts, every row of a batch has its own copy of all adapters and mixers.

    After a backward within, a copy's ``grad`` [rows, ...] is the gradient by row, None where none
    reached it, and the parameter's own is their sum. Copies take no memory; their gradients do.

    Args:
        model: called with batches of ``rows`` rows. Its trained heads are not copied.

    Yields:
        The trained tensors' copies, by name.

    Raises:
        HiddenRows: from the model's forward, where a layer's x is not [rows, ..., K].
    """
    segments = Segments.of(range(rows), rows)
    copies: State = {}
    layers = [layer for _, layer in mixed_layers(model)]
    try:
        for name, layer in mixed_layers(model):
            own = {
                leaf: p.expand(rows, *p.shape)
                for leaf, p in layer.named_parameters()
                if not leaf.startswith("base.")
            }
            for leaf, copy in own.items():
                if copy.requires_grad:
                    copy.retain_grad()
                    copies[f"{name}.{leaf}"] = copy
            layer.forward = partial(_forward, layer, own, segments)  # type: ignore[method-assign]
        yield copies
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _forward(layer: MixedLoRALinear, own: State, segments: Segments, x: Tensor) -> Tensor:
    if x.ndim < 3 or len(x) != len(segments.sizes):
        raise HiddenRows
    adapters = [Adapter(own[f"{name}.a"], own[f"{name}.b"]) for name in layer.names]
    return apply_stacked(layer, x, adapters, own.get("mixer"), segments)

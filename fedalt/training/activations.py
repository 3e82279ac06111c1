"""What a training step keeps for its backward: less of it, or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedalt.errors import InputError

SMALL = 2**16
"""Bytes; to copy a smaller tensor takes longer to start than to do."""


def check_recomputes(model: nn.Module) -> None:
    """``InputError`` for a model whose blocks cannot be computed again in the backward."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        name = type(model).__name__
        raise InputError(f"train.gradient_checkpointing: {name} has none; turn it off")


@contextmanager
def recomputing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """While it lasts, every block keeps its input alone in training mode.

    Dropout draws the same masks again: the generators' states are set back for it.
    """
    if not wanted:
        yield
        return
    base: Any = model
    # The older name warns where the newer one is known.
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(name for name in names if hasattr(base, f"{name}_enable"))
    getattr(base, f"{name}_enable")({"use_reentrant": False})
    base.disable_input_require_grads()  # only the reentrant kind wants inputs that ask for one
    try:
        yield
    finally:
        getattr(base, f"{name}_disable")()


class Offload:
    """Takes saved tensors to host memory and brings them back, but for the model's own weights.

    Copies are queued on the stream that made the tensor and on the one that asks for it, so
    nothing waits for them but what needs them.
    """

    def __init__(self, model: nn.Module) -> None:
        """Notes the storages of the parameters, buffers and quantization states of ``model``."""
        own = [*model.buffers(), *model.state_dict(keep_vars=True).values()]
        self._own = {t.untyped_storage()._cdata for t in own if isinstance(t, Tensor)}

    def pack(self, tensor: Tensor) -> Tensor | tuple[Tensor, torch.device]:
        """A copy in host memory and where it was; a small tensor or a weight, as it is."""
        small = tensor.numel() * tensor.element_size() < SMALL
        if small or tensor.untyped_storage()._cdata in self._own:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=True), tensor.device

    def unpack(self, packed: Tensor | tuple[Tensor, torch.device]) -> Tensor:
        """The tensor where it was."""
        if isinstance(packed, Tensor):
            return packed
        host, device = packed
        return host.to(device, non_blocking=True)


def offloading(model: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """A context for forward passes; it can be entered again and again, one at a time."""
    if not wanted:
        return nullcontext()
    offload = Offload(model)
    return saved_tensors_hooks(offload.pack, offload.unpack)

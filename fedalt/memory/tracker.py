"""Which bytes live when, and what for: a step of a model is followed storage by storage.

It is followed in a ``FakeTensorMode``, whose tensors have shapes but no numbers, so that a model of
any size is followed in seconds and in next to no memory, through the device's own kernels.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as every_module
from torch.optim import optimizer as every_optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

aten = torch.ops.aten


class Kind(StrEnum):
    """What bytes are for; what is kept for the backward goes by the module that asked for it."""

    BASE = "base weights"
    ADAPTERS = "adapters and mixers, both adapters"
    GRADIENTS = "their gradients"
    OPTIMIZER = "optimizer"
    ADAPTED = "kept by adapted layers"
    ATTENTION = "kept by attention"
    POINTWISE = "kept by norms and activation functions"
    REST = "kept by the rest (residuals, products, masks)"
    LOGITS = "logits and loss"
    CACHE = "key-value cache"
    TEMPORARY = "temporaries and gradients in flight"


@dataclass(eq=False, slots=True)
class Held:
    """One storage: its bytes, and what it has turned out to be for."""

    bytes: int
    kind: Kind


class _Enough(Exception):
    """All that was to be followed has been."""


class Tracker(TorchDispatchMode):
    """While it is entered, knows the live bytes on one device; ``peak`` is what their most were.

    What is asked of the numbers is answered without them: one that is read is 0, and a mask that
    picks picks all.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module | None,
        device: torch.device,
        own: Mapping[int, Kind],
    ) -> None:
        """Begin with the model alone.

        Args:
            model: in fake tensors.
            head: what makes the logits.
            device: whose bytes count.
            own: by ``id``, the kinds of the model's parameters and buffers; the others are base.
        """
        super().__init__()
        self._model, self._head, self._device = model, head, device
        self._forwards_left: int | None = None
        self._live: dict[int, tuple[Any, Held]] = {}
        self._now = self._most = 0
        self._risen = False
        self._at_most: list[Held] = []
        self._stack: list[nn.Module] = []
        self._in_loss = False
        self.moments = 0
        """Bytes that the last optimizer held after its step."""
        self.cache: list[int] = []
        """Bytes of every tensor of the key-value cache after the last forward that had one."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._see(tensor, own.get(id(tensor), Kind.BASE))

    @property
    def peak(self) -> Counter[Kind]:
        """Bytes by kind at the moment when there were most of them."""
        parts: Counter[Kind] = Counter()
        for held in self._at_most if not self._risen else self._all():
            parts[held.kind] += held.bytes
        return parts

    def held(self, kind: Kind) -> list[int]:
        """The sizes of all storages of a kind that are live now, in bytes."""
        return [held.bytes for held in self._all() if held.kind == kind]

    @contextmanager
    def following(self, forwards: int | None = None) -> Iterator[None]:
        """Follow what is done while it lasts, in every module and optimizer.

        Args:
            forwards: of the model, after which it is left, as by a ``break``: what would end the
                making of tokens is in numbers. None: to its end.
        """
        self._forwards_left = forwards
        handles: list[RemovableHandle] = [
            every_module.register_module_forward_pre_hook(self._enter_module),
            every_module.register_module_forward_hook(self._leave_module, always_call=True),
            every_optimizer.register_optimizer_step_pre_hook(self._before_step),
            every_optimizer.register_optimizer_step_post_hook(self._after_step),
        ]
        try:
            with (
                suppress(_Enough),
                self,
                saved_tensors_hooks(self._keep, lambda tensor: tensor),
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if operator is aten._local_scalar_dense.default:
            return 0
        if operator is aten.equal.default:
            return True
        if operator is aten.index.Tensor and _is_mask(args[1]):
            out = args[0].flatten(0, args[1][0].ndim - 1).clone()
        else:
            out = operator(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._see(each, self._kind_of_new())
        return out

    def _see(self, tensor: Tensor, kind: Kind) -> Held | None:
        """The storage's record; a new one where the storage is new, None on another device."""
        if tensor.device.type != self._device.type:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            held = Held(storage.nbytes(), kind)

            def free(_: Any) -> None:
                if self._risen:
                    self._at_most, self._risen = self._all(), False
                del self._live[key]
                self._now -= held.bytes

            self._live[key] = weakref.ref(storage, free), held
            self._now += held.bytes
            if self._now > self._most:
                self._most, self._risen = self._now, True
        return self._live[key][1]

    def _all(self) -> list[Held]:
        return [held for _, held in self._live.values()]

    def _kind_of_new(self) -> Kind:
        """Of what is made now, until it turns out to be kept."""
        if self._head is not None and self._head in self._stack:
            return Kind.LOGITS
        return Kind.LOGITS if self._in_loss and not self._stack else Kind.TEMPORARY

    def _keep(self, tensor: Tensor) -> Tensor:
        """A tensor is kept for the backward by the innermost module at work."""
        held = self._see(tensor, Kind.TEMPORARY)
        if held is not None and held.kind in (Kind.TEMPORARY, Kind.REST):
            made_by_loss = self._kind_of_new() == Kind.LOGITS
            held.kind = Kind.LOGITS if made_by_loss else _kept_by(self._stack)
        return tensor

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is self._model and self._forwards_left is not None:
            if not self._forwards_left:
                raise _Enough
            self._forwards_left -= 1
        for each in args:
            if isinstance(each, Tensor):
                self._see(each, Kind.REST)  # what no operator has made: pixels
        if module is self._head:
            self._in_loss = True
            if args[0].requires_grad:
                args[0].register_hook(self._leave_loss)
        self._stack.append(module)

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while self._stack and self._stack.pop() is not module:
            pass
        if self._stack or _in_backward():
            return
        if torch.is_grad_enabled():
            self._relabel(Kind.REST)
        elif getattr(output, "past_key_values", None) is not None:
            self._relabel(Kind.CACHE)
            self.cache = self.held(Kind.CACHE)

    def _relabel(self, kind: Kind) -> None:
        """What a whole forward leaves behind was not temporary."""
        for held in self._all():
            if held.kind == Kind.TEMPORARY:
                held.kind = kind

    def _leave_loss(self, gradient: Tensor) -> None:
        self._in_loss = False

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._label(parameter, Kind.ADAPTERS)
                if parameter.grad is not None:
                    self._label(parameter.grad, Kind.GRADIENTS)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for each in tree_leaves(list(optimizer.state.values())):
            if isinstance(each, Tensor):
                self._label(each, Kind.OPTIMIZER)
        self.moments = sum(self.held(Kind.OPTIMIZER))

    def _label(self, tensor: Tensor, kind: Kind) -> None:
        held = self._see(tensor, kind)
        if held is not None:
            held.kind = kind


def _is_mask(indices: Any) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _kept_by(stack: list[nn.Module]) -> Kind:
    """The kind of what the innermost module of a stack keeps, by what its class is called."""
    if not stack:
        return Kind.REST
    name, place = type(stack[-1]).__name__, type(stack[-1]).__module__
    if name in ("MixedLoRALinear", "GroupedMixedLoRALinear"):
        return Kind.ADAPTED
    if "Attention" in name:
        return Kind.ATTENTION
    activation = place in ("torch.nn.modules.activation", "transformers.activations")
    return Kind.POINTWISE if activation or "Norm" in name else Kind.REST

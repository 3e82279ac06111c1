"""How much of each adapter the mixers let through: the mean gates of a model at work."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedalt.states import mixed_layers


class GateMeter:
    """The mean of the individual adapter's gate over real tokens, by layer.

    ``g_0 = softmax(mixer x)_0`` (dimensionless, 0 to 1) of every adapted layer with two adapters,
    over all forward passes made while the meter is entered; the Rest-of-World has the rest.
    Padding, where the model is given an ``attention_mask``, does not count. Sums are fp64 and stay
    on the device. Layers with fixed weights report these.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = {n: l for n, l in mixed_layers(model) if l.rest_of_world is not None}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._mask: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> GateMeter:
        self._handles = [self._model.register_forward_pre_hook(self._see_mask, with_kwargs=True)]
        for name, layer in self._layers.items():
            if layer.mixer is not None and layer.mixer.ndim == 2:
                hook = self._measure(name)
                self._handles.append(layer.register_forward_pre_hook(hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._mask = None

    def means(self) -> dict[str, float]:
        """By layer name, the individual adapter's mean gate; none of a layer that saw no token."""
        means = {}
        for name, layer in self._layers.items():
            if name in self._sums:
                means[name] = float(self._sums[name] / self._counts[name])
            elif layer.fixed is not None:
                means[name] = layer.fixed[0]
            elif layer.mixer is not None and layer.mixer.ndim == 1:
                means[name] = float(layer.mixer.detach().double().softmax(0)[0])
        return means

    def _see_mask(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._mask = kwargs.get("attention_mask")

    def _measure(self, name: str) -> Any:
        @torch.no_grad()
        def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            logits = (x.float() @ layer.mixer.float().T).double()
            gate = logits.softmax(-1)[..., 0]
            real = torch.ones_like(gate)
            if self._mask is not None and self._mask.shape == gate.shape:
                real = self._mask.double()
            self._sums[name] = self._sums.get(name, 0.0) + (gate * real).sum()
            self._counts[name] = self._counts.get(name, 0.0) + real.sum()

        return hook

"""One pass over x for all the layers that read it, as q, k and v or gate and up do.

The down-projections and mixers of such layers differ only in values.  On a GPU, the first of them
to be called with an x lets `fused.shared_strips` make P, S and the gates of all of them in one
launch, and the others find theirs made.  Each keeps its own dropout seed, drawn in the layers'
order, so results are bit for bit those of layers that do not share.  Gradients are untouched: a
layer's backward derives P and the gates from x as if it had made them itself.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapter import Branches, rows_of
from .choice import implementation, plain
from .dropout import draw_seed, drop_threshold, keep_scale
from .plans import Plans

Layer = Any  # a MixedLoRALinear, whose module imports this one


class Made(NamedTuple):
    """What is waiting for a layer: its seed and its strip, for these versions of its parameters."""

    seed: Tensor | None
    strip: Any
    versions: tuple[int, ...]


class SharedInput:
    """The layers that read one x; `take` is how a layer asks for its part."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self._forget()

    def _forget(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version = 0
        self._waiting: dict[int, Made] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]
        self._forget()

    def take(self, layer: Layer, x: Tensor) -> Made | None:
        """What was made for this layer of this very x, or None: then it serves itself.

        Layers that turn out to read different tensors are released from sharing.
        """
        on_cpu = x.device.type == "cpu" and layer.impl != "triton"
        if on_cpu or torch.compiler.is_compiling() or plain(x) or x.is_inference():
            return None
        if self._x is None or self._x() is not x or self._version != x._version:
            if self._waiting:
                self._release()
                return None
            self._make(x)
        made = self._waiting.pop(id(layer), None)
        return made if made is not None and made.versions == _versions(layer) else None

    def _release(self) -> None:
        for layer in self.layers:
            layer.shared = None
        self._forget()

    @torch.no_grad()
    def _make(self, x: Tensor) -> None:
        self._forget()
        self._x, self._version = weakref.ref(x), x._version
        if torch.is_autocast_enabled(x.device.type):
            return
        from . import fused  # only here, since it needs Triton

        weights = [layer.weight for layer in self.layers]
        key = (
            *(x.shape, x.dtype, x.device, x.stride(), x.data_ptr() % 16),
            *map(_settings, self.layers, weights),
        )
        worth = _worth.get(key)
        if worth is None:
            worth = _worth.made(key, lambda: self._is_worth_it(fused, x, weights))
        if not worth:
            return
        first = self.layers[0]
        threshold = drop_threshold(first.dropout if first.training else 0.0)
        parts = []
        for layer in self.layers:
            adapters = layer.adapters
            seed = draw_seed(x.device) if threshold else None
            scaling = layer.scaling * (keep_scale(threshold) if threshold else 1.0)
            downs, ups = [a for a, _ in adapters], [b for _, b in adapters]
            parts.append(Branches(downs, ups, layer.mixer, layer.fixed, scaling, threshold, seed))
        strips = fused.shared_strips(rows_of(x), [weight.shape[0] for weight in weights], parts)
        self._waiting = {
            id(layer): Made(branches.seed, strip, _versions(layer))
            for layer, branches, strip in zip(self.layers, parts, strips, strict=True)
        }

    def _is_worth_it(self, fused: Any, x: Tensor, weights: Sequence[Any]) -> bool:
        """Whether one launch serves all layers, as Triton kernels, and is worth it."""
        first = self.layers[0]
        alike = x.numel() > 0 and all(
            implementation(layer.impl, x, weight) == "triton"
            and (layer.quantized or weight.dtype == x.dtype)
            and weight.shape[1] == x.shape[-1]
            and (layer.mixer is None or layer.mixer.ndim == 2)
            and _settings(layer, weight)[:_SHARED] == _settings(first, weights[0])[:_SHARED]
            for layer, weight in zip(self.layers, weights, strict=True)
        )
        ranks = [a.shape[0] for a, _ in first.adapters]
        dropout = first.training and first.dropout > 0
        return alike and fused.worth_sharing(rows_of(x), weights, ranks, dropout)


_worth: Plans[bool] = Plans()
_SHARED = 5  # settings that layers must have in common


def _settings(layer: Layer, weight: Any) -> tuple[Any, ...]:
    """What decides on sharing of a layer: what the layers must have in common, then its own."""
    mode = layer.dropout if layer.training else 0.0
    mixer = layer._parameters["mixer"]
    common = layer.rank, layer.scaling, mode, layer.fixed, (mixer is None, len(layer.names))
    form = weight.stride() if isinstance(weight, Tensor) else weight.kind
    own = weight.shape, form, layer.impl, None if mixer is None else mixer.ndim
    return *common, *own, None if layer.quantized else weight.dtype


def _versions(layer: Layer) -> tuple[int, ...]:
    tensors = [factor for adapter in layer.adapters for factor in adapter]
    if layer.mixer is not None:
        tensors.append(layer.mixer)
    return tuple([tensor._version for tensor in tensors])

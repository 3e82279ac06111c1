"""One pass over x for all the layers that read it, as q, k and v or gate and up do.

The down-projections and mixers of such layers differ only in values.  On a GPU, the first of them
to be called with an x lets a plan of `fused.shared_strips` make P, S and the gates of all of them
in one launch, and the others find theirs made.  Each keeps its own dropout seed, drawn in the
layers' order, so results are bit for bit those of layers that do not share.  Gradients are
untouched: a layer's backward derives P and the gates from x as if it had made them itself.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter, Branches, rows_of
from .choice import implementation, plain
from .dispatch import undifferentiated
from .dropout import draw_seed, drop_threshold, keep_scale
from .plans import Plans

Layer = Any  # a MixedLoRALinear, whose module imports this one
Adapters = Sequence[Adapter]


class Made(NamedTuple):
    """What is waiting for a layer: its seed and its strip, for these versions of its parameters."""

    seed: Tensor | None
    strip: Any
    versions: tuple[int, ...]


class Plan(NamedTuple):
    """How the layers share a kind of x."""

    strips: Callable[[Tensor, Sequence[Branches]], list[Any]] | None  # None: each serves itself
    scalings: tuple[float, ...]  # of each layer, the dropout's keep scale included
    threshold: int  # of the dropout


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

    def take(self, layer: Layer, x: Tensor, adapters: Adapters) -> Made | None:
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
        return made if made is not None and made.versions == _versions(layer, adapters) else None

    def _release(self) -> None:
        for layer in self.layers:
            layer.shared = None
        self._forget()

    def _make(self, x: Tensor) -> None:
        self._forget()
        self._x, self._version = weakref.ref(x), x._version
        if torch.is_autocast_enabled(x.device.type):
            return
        layers = self.layers
        weights = [layer.weight for layer in layers]
        adapters = [layer.adapters for layer in layers]
        key = (
            *(x.shape, x.dtype, x.device, x.stride(), x.data_ptr() % 16),
            x.dtype is torch.float32 and torch.get_float32_matmul_precision(),
            *map(_settings, layers, weights, adapters),
        )
        plan = _plans.get(key) or _plans.made(key, lambda: self._plan(x, weights, adapters))
        if plan.strips is None:
            return
        parts = [
            _branches(*each, plan.threshold, x.device)
            for each in zip(layers, adapters, plan.scalings, strict=True)
        ]
        with undifferentiated():
            strips = plan.strips(rows_of(x), parts)
        for layer, pairs, part, strip in zip(layers, adapters, parts, strips, strict=True):
            self._waiting[id(layer)] = Made(part.seed, strip, _versions(layer, pairs))

    def _plan(self, x: Tensor, weights: Sequence[Any], adapters: Sequence[Adapters]) -> Plan:
        """One pass where one launch serves all layers, as Triton kernels, and is worth it."""
        from . import fused  # only here, since it needs Triton

        first, *_ = self.layers
        threshold = drop_threshold(first.dropout if first.training else 0.0)
        scale = keep_scale(threshold) if threshold else 1.0
        scalings = tuple([layer.scaling * scale for layer in self.layers])
        common = [each[:_SHARED] for each in map(_settings, self.layers, weights, adapters)]
        alike = x.numel() > 0 and all(
            implementation(layer.impl, x, weight) == "triton"
            and (layer.quantized or weight.dtype == x.dtype)
            and weight.shape[1] == x.shape[-1]
            and (layer.mixer is None or layer.mixer.ndim == 2)
            and mine == common[0]
            for layer, weight, mine in zip(self.layers, weights, common, strict=True)
        )
        ranks = [a.shape[0] for a, _ in adapters[0]]
        rows = rows_of(x)
        if not (alike and fused.worth_sharing(rows, weights, ranks, threshold > 0)):
            return Plan(None, scalings, threshold)
        outputs = [weight.shape[0] for weight in weights]
        part = _branches(first, adapters[0], scalings[0], threshold, None)
        return Plan(fused.shared_strips(rows, outputs, part), scalings, threshold)


_plans: Plans[Plan] = Plans()
_SHARED = 5  # settings that layers must have in common


def _settings(layer: Layer, weight: Any, adapters: Adapters) -> tuple[Any, ...]:
    """What decides on sharing of a layer: what the layers must have in common, then its own."""
    mode = layer.dropout if layer.training else 0.0
    mixer = layer._parameters["mixer"]
    dtypes = (None if mixer is None else mixer.dtype, *[(a.dtype, b.dtype) for a, b in adapters])
    common = layer.rank, layer.scaling, mode, layer.fixed, dtypes
    form = weight.stride() if isinstance(weight, Tensor) else weight.kind
    own = weight.shape, form, layer.impl, None if mixer is None else mixer.ndim
    return *common, *own, None if layer.quantized else weight.dtype


def _branches(
    layer: Layer,
    adapters: Adapters,
    scaling: float,
    threshold: int,
    device: torch.device | None,
) -> Branches:
    """A layer beside its base, with a seed drawn on a device, if given, where there is dropout."""
    seed = draw_seed(device) if threshold and device is not None else None
    downs, ups = [a for a, _ in adapters], [b for _, b in adapters]
    mixer = layer._parameters["mixer"]
    return Branches(downs, ups, mixer, layer.fixed, scaling, threshold, seed)


def _versions(layer: Layer, adapters: Adapters) -> tuple[int, ...]:
    mixer = layer._parameters["mixer"]
    own = () if mixer is None else (mixer._version,)
    return *own, *[factor._version for adapter in adapters for factor in adapter]

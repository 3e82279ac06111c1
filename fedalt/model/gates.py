"""How much of each adapter the mixers let through: the mean gates of a model at work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedalt.model.base import sum_dtype
from fedalt.model.states import mixed_layers
from fedalt_kernels import GroupedMixedLoRALinear, MixedLoRALinear, Segments

Layer = MixedLoRALinear | GroupedMixedLoRALinear


class GateMeter:
    """The mean of the individual adapter's gate over real tokens, by layer.

    ``g_0 = softmax(mixer x)_0`` (dimensionless, 0 to 1) of every adapted layer with two adapters,
    over all forward passes made while the meter is entered; it may be entered again and again.

    Padding does not count where the model is given an ``attention_mask`` [B, L] by that name. A
    layer may see all L positions, the last of them alone or, flattened, x [B L, K]; calls that see
    other tokens, of which the mask does not tell, as an expert's do, do not count. Sums are of
    ``sum_dtype`` and stay on the device until ``means``.

    Layers whose weights do not depend on the token report these, with or without a pass; layers
    that add both adapters with weight 1 have no gate and report nothing.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, GroupedMixedLoRALinear] | None = None
    ) -> None:
        """``layers``: by name, those of many clients that took the place of the model's own."""
        self._model = model
        found = dict(mixed_layers(model)) if layers is None else layers
        self._layers = {n: each for n, each in found.items() if each.rest_of_world is not None}
        self._totals: dict[str, Tensor] = {}
        self._mask: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> GateMeter:
        self._handles = [self._model.register_forward_pre_hook(self._see_mask, with_kwargs=True)]
        for name, layer in self._layers.items():
            if layer.mixer is not None and _by_client(layer, layer.mixer).ndim == 3:
                self._handles.append(
                    layer.register_forward_pre_hook(self._watch(name, layer.mixer))
                )
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

    def means(self, client: int = 0) -> dict[str, float]:
        """By layer name, the individual adapter's mean gate; none of a layer that saw no token.

        Args:
            client: by number, where the layers have many.
        """
        means = {}
        for name, layer in self._layers.items():
            if name in self._totals:
                total, tokens = self._totals[name][client].tolist()
                if tokens:
                    means[name] = total / tokens
            elif layer.fixed is not None:
                means[name] = layer.fixed[0]
            elif layer.mixer is not None and (mixer := _by_client(layer, layer.mixer)).ndim == 2:
                own = mixer[client].detach()
                means[name] = own.to(sum_dtype(own.device)).softmax(0)[0].item()
        return means

    def _see_mask(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._mask = kwargs.get("attention_mask")

    def _watch(self, name: str, mixer: Tensor) -> Callable[[Any, tuple[Tensor, ...]], None]:
        @torch.no_grad()
        def hook(layer: Layer, args: tuple[Tensor, ...]) -> None:
            x, mixers = args[0], _by_client(layer, mixer)
            flat = x.reshape(-1, x.shape[-1]).to(mixers.dtype)
            whose = layer.segments_of if isinstance(layer, GroupedMixedLoRALinear) else None
            segments = whose(x) if whose else Segments((len(flat),), None, None)
            parts = list(segments.slices())
            if not parts:  # an expert may see no token
                return
            flat = segments.sort(flat)
            gates = [(flat[part] @ mixers[client].T).softmax(-1)[:, 0] for client, part in parts]
            gate = segments.restore(torch.cat(gates)).view(x.shape[:-1])
            gate = gate.to(sum_dtype(gate.device))
            real = _real_tokens(self._mask, gate)
            if real is None:
                return
            both = torch.stack([gate.masked_fill(~real, 0).flatten(), real.flatten().to(gate)], 1)
            both, seen = segments.sort(both), gate.new_zeros(len(mixers), 2)
            for client, part in parts:
                seen[client] = both[part].sum(0)
            self._totals[name] = self._totals[name] + seen if name in self._totals else seen

        return hook


def _by_client(layer: Layer, mixer: Tensor) -> Tensor:
    """A layer's mixers, client by client: [C, 2, K], or [C, 2] where they ask no token."""
    return mixer if isinstance(layer, GroupedMixedLoRALinear) else mixer[None]


def _real_tokens(mask: Tensor | None, gate: Tensor) -> Tensor | None:
    """True where a token of ``gate`` is real, False where it is padding; None: nothing tells."""
    if mask is None:
        return torch.ones_like(gate, dtype=torch.bool)
    if mask.ndim == 2 and gate.shape == (mask.numel(),):
        return mask.flatten().bool()
    if mask.ndim == gate.ndim == 2 and len(mask) == len(gate) and gate.shape[1] <= mask.shape[1]:
        return mask[:, mask.shape[1] - gate.shape[1] :].bool()
    return None

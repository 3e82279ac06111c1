"""Adapters that never run: found in a client's first step, before they are trained for nothing."""

from __future__ import annotations

import warnings

from torch import nn

from fedalt.errors import InputError, InputWarning
from fedalt.model import in_short, kind_of, mixed_layers, without_gradient


class UnusedLayers(InputError):
    """No gradient reached any layer of a kind: the settings' fault, whichever client it is."""


class UnusedWatch:
    """Asks after every backward, as long as need be, which layers got no gradient.

    The first time it refuses each kind of layer, those whose names differ in numbers alone, of
    which none got one, and each module trained whole that got none. Where others of their kind did,
    layers are waited for, and told if none comes: an expert may get no token of a batch, and a
    block may be skipped at random.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._waiting: set[str] | None = None

    def look(self) -> None:
        """To be called when gradients are there; raises ``UnusedLayers``."""
        if self._waiting is None:
            self._waiting = set(without_gradient(self._model))
            self._refuse(self._waiting)
        elif self._waiting:
            self._waiting &= set(without_gradient(self._model))

    def _refuse(self, unused: set[str]) -> None:
        used = {kind_of(name) for name, _ in mixed_layers(self._model) if name not in unused}
        never = [name for name in sorted(unused) if kind_of(name) not in used]
        if never:
            raise UnusedLayers(
                f"lora: {in_short(never)}: no gradient reached what is trained there in the first "
                "step; the model reads the weights but never calls the layers, or its loss does "
                "not depend on them; leave them out of lora.target_modules or modules_to_save"
            )

    def tell(self) -> None:
        """After the last backward; an ``InputWarning`` names the layers that are waited for yet."""
        if self._waiting:
            warnings.warn(
                f"lora: {in_short(self._waiting)}: no gradient reached {len(self._waiting)} of "
                "these layers in any step of a client's round; it reached others",
                InputWarning,
                stacklevel=3,
            )

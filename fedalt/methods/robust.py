"""Averages that a few bad updates cannot move far, and the test of an update at the door."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

Update = Mapping[str, Tensor]


def exact(share: float) -> Fraction:
    """A share as it was written: in binary 0.29 · 100 is below 29."""
    return Fraction(str(share))


def trimmed_mean(updates: Sequence[Update], trim: float) -> dict[str, Tensor]:
    """Of every number, the mean without the ``⌊trim · n⌋`` smallest and largest (Yin et al. 2018).

    Works on one tensor of all clients at a time. Clients count alike.
    """
    return _middle(updates, cut=math.floor(exact(trim) * len(updates)))


def median(updates: Sequence[Update]) -> dict[str, Tensor]:
    """Of every number, the median; of an even number of clients the mean of the middle two."""
    return _middle(updates, cut=(len(updates) - 1) // 2)


class Clipped(Mapping[str, Tensor]):
    """An update whose change is scaled: ``before + factor (update − before)``, made when read."""

    def __init__(self, update: Update, before: Update, factor: float) -> None:
        self._update, self._before, self._factor = update, before, factor

    def __getitem__(self, name: str) -> Tensor:
        return torch.lerp(self._before[name], self._update[name], self._factor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._update)

    def __len__(self) -> int:
        return len(self._update)


def change_norm(update: Update, before: Update) -> float:
    """Euclidean norm, in fp64, of all that an update changes of ``before``."""
    squares = [(update[name].double() - before[name].double()).square().sum() for name in update]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def fault(update: Update, before: Update) -> str | None:
    """Why the server cannot count an update, or None.

    ``before`` is the same part of what the client started its round from: names, shapes and dtypes
    must be its own, and every number finite.
    """
    for name in sorted(update.keys() ^ before.keys()):
        return f"{name} is {'missing' if name in before else 'not known here'}"
    for name, tensor in update.items():
        wanted = before[name]
        if tensor.shape != wanted.shape:
            return f"{name} has shape {tuple(tensor.shape)}, wanted {tuple(wanted.shape)}"
        if tensor.dtype != wanted.dtype:
            return f"{name} is {tensor.dtype}, wanted {wanted.dtype}"
        if not tensor.isfinite().all():
            kind = "NaN" if tensor.isnan().any() else "an infinite number"
            return f"{name} holds {kind}"
    return None


def out_of_proportion(norms: Mapping[str, float], ratio: float | None) -> dict[str, str]:
    """By client, why its change is too large: more than ``ratio`` times the median of all.

    With fewer than three clients nobody can say who is out of proportion, and none is.
    """
    if ratio is None or len(norms) < 3:
        return {}
    middle = statistics.median(norms.values())
    return {
        client: f"its change has norm {norm:.3g}, more than {ratio:g} times the median {middle:.3g}"
        for client, norm in norms.items()
        if norm > ratio * middle
    }


def _middle(updates: Sequence[Update], cut: int) -> dict[str, Tensor]:
    means = {}
    for name, tensor in updates[0].items():
        values = torch.stack([update[name].double() for update in updates]).sort(dim=0).values
        means[name] = values[cut : len(updates) - cut].mean(dim=0).to(tensor.dtype)
    return means

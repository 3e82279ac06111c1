"""What server and sites say to each other, without a word of Flower in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

HELLO, ROUND, LAST = "hello", "round", "last"
"""What a message asks for: who are you; a round's turn; what comes after the last round."""
GRID_LIMIT, GRID_STEPS = 4.0, 2**22
GRID = 2 * GRID_LIMIT / GRID_STEPS
"""Of a secure sum: updates are cut to ±GRID_LIMIT and rounded to whole multiples of GRID, so that
what is subtracted from the sum is to the bit what was counted."""


@dataclass(frozen=True)
class Parcel:
    """A message's content: values that JSON spells, and states by name."""

    values: Mapping[str, Any]
    states: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 over the values, and the names, dtypes, shapes and bytes of the states."""
        sha = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode())
        for group, state in sorted(self.states.items()):
            for name in sorted(state):
                tensor = state[name].contiguous()
                sha.update(f"{group} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()


def form_of(state: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """By name, dtype and shape, as JSON spells them."""
    return {n: [str(t.dtype).removeprefix("torch."), *t.shape] for n, t in state.items()}


def of_form(form: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    """Tensors without values, of that form."""
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (dtype, *shape) in form.items()
    }


def on_grid(update: Mapping[str, Tensor], share: float) -> tuple[dict[str, Tensor], int]:
    """``share × update`` as a secure sum counts it, fp64; and how many numbers were cut."""
    scaled = {name: t.double() * share for name, t in update.items()}
    cut = sum(int((t.abs() > GRID_LIMIT - GRID).sum()) for t in scaled.values())
    low, high = -GRID_LIMIT, GRID_LIMIT - GRID
    return {n: (t.clamp(low, high) / GRID).round() * GRID for n, t in scaled.items()}, cut


class Link(Protocol):
    """The server's way to its sites: Flower's grid, or a test's own."""

    def nodes(self) -> list[int]:
        """The nodes that are there."""

    def send(self, node: int, kind: str, parcel: Parcel) -> str:
        """Post a message and give its ticket."""

    def replies(self, tickets: Collection[str]) -> Mapping[str, Parcel | str]:
        """By ticket, the answers that have come; text is an error of Flower's."""

    def wait(self) -> None:
        """Let some time pass."""

    def secure_sum(
        self, parcels: Mapping[int, Parcel], form: Mapping[str, Sequence[Any]], timeout: float
    ) -> tuple[Mapping[str, Tensor], Mapping[int, Parcel]]:
        """The sum, fp64, of the updates of those who answered, and by node what they told."""

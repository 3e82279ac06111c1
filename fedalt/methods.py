"""FedALT and its rivals: each a few lines of declaration over one loop (``run.py``).

In every round a client loads its state, trains what asks for a gradient, and hands in its
individual adapters; ``combine`` turns all hand-ins into what each client installs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fedalt import server
from fedalt.errors import InputError

Update = Mapping[str, Tensor]


class Method:
    """What is in the forward, what is sent, how it is combined, and what a client then uses."""

    name: ClassVar[str]
    rest_of_world: ClassVar[bool] = False
    """The forward holds a second, frozen adapter and a trained mixer; ``combine`` fills it."""
    sends: ClassVar[bool] = True
    """Clients hand in their individual adapters. A method that does not needs no other client."""
    keeps_local: ClassVar[bool] = False
    """A client is evaluated and used as it was before the last installation."""

    def combine(self, updates: Sequence[Update], examples: Sequence[int]) -> list[Update]:
        """What every client installs, under the names of the individual adapters.

        Args:
            updates: the individual adapters handed in, one dict a client.
            examples: the number of train records of each.

        Returns:
            One dict a client. It goes into the Rest-of-World adapters if the method has them,
            else it takes the place of the individual ones.
        """
        raise NotImplementedError


class FedALT(Method):
    """Individual LoRA and mixer trained; Rest-of-World, the others' mean, frozen beside them."""

    name = "fedalt"
    rest_of_world = True

    def combine(self, updates: Sequence[Update], examples: Sequence[int]) -> list[Update]:
        return list(server.rest_of_world(updates))


class Local(Method):
    """Every client alone: nothing is sent."""

    name = "local"
    sends = False


class FedIT(Method):
    """FedAvg of one LoRA, weighted by examples (Zhang et al. 2024)."""

    name = "fedit"

    def combine(self, updates: Sequence[Update], examples: Sequence[int]) -> list[Update]:
        return [server.mean(updates, examples)] * len(updates)


class FedITFineTuned(FedIT):
    """FedIT; each client then uses its own last local state, the mean trained once more."""

    name = "fedit+ft"
    keeps_local = True


METHODS: dict[str, Method] = {
    method.name: method for method in (FedALT(), Local(), FedIT(), FedITFineTuned())
}


def get_method(name: str) -> Method:
    """The method of that name; ``InputError`` names the known ones."""
    if name not in METHODS:
        raise InputError(f"method: no method is named {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]

"""Aggregation: adapters in, adapters out. Pure functions; sums are fp64 in the order given.

An update is a ``dict[str, Tensor]`` of a client's individual adapters; all updates have the same
names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Update = Mapping[str, Tensor]


def rest_of_world(updates: Sequence[Update]) -> list[dict[str, Tensor]]:
    """Leave-one-out means from one sum: ``row_i = (Σ_j c_j − c_i) / (n − 1)``, A and B apart.

    The sum is fp64 and exactly what was counted is subtracted, so ``row_i`` is the mean of the
    others rounded once to the tensor's dtype. With two clients it *is* the other's adapter.

    Args:
        updates: one dict a client, n of them, in a fixed order.

    Returns:
        One dict a client, dtypes as given.

    Raises:
        ValueError: fewer than two updates, or names or shapes that differ.
    """
    if len(updates) < 2:
        raise ValueError(f"rest_of_world wants at least two clients, got {len(updates)}")
    total = _sum(updates, [1.0] * len(updates))
    others = len(updates) - 1
    return [
        {name: ((total[name] - c.double()) / others).to(c.dtype) for name, c in update.items()}
        for update in updates
    ]


def mean(updates: Sequence[Update], weights: Sequence[float]) -> dict[str, Tensor]:
    """FedAvg: ``Σ_j w_j c_j / Σ_j w_j`` (McMahan et al. 2017), A and B apart.

    Args:
        updates: one dict a client.
        weights: one positive number a client, such as its number of examples.

    Raises:
        ValueError: no updates, another number of weights, or names or shapes that differ.
    """
    if not updates or len(updates) != len(weights):
        raise ValueError(f"mean wants a weight each, got {len(updates)} and {len(weights)}")
    total = _sum(updates, weights)
    return {name: (total[name] / sum(weights)).to(c.dtype) for name, c in updates[0].items()}


def _sum(updates: Sequence[Update], weights: Sequence[float]) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(c, dtype=torch.float64) for name, c in updates[0].items()}
    for position, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        if update.keys() != total.keys():
            name = sorted(update.keys() ^ total.keys())[0]
            raise ValueError(f"updates 0 and {position} do not both hold {name}")
        for name, c in update.items():
            if c.shape != total[name].shape:
                shapes = f"{tuple(total[name].shape)} and {tuple(c.shape)}"
                raise ValueError(f"{name}: updates 0 and {position} have shapes {shapes}")
            total[name].add_(c.double(), alpha=weight)
    return total

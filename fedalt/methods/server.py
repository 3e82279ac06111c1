"""Aggregation: adapters in, adapters out. Pure functions; sums are fp64 in the order given.

An update is a mapping from names to tensors, such as a client's individual adapters; all updates
have the same names and shapes. They may be read from disk one at a time: a mean holds one sum and
one update, never all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    row = leave_one_out({str(i): update for i, update in enumerate(updates)})
    return [row(str(i)) for i in range(len(updates))]


def leave_one_out(
    updates: Mapping[str, Update], weights: Mapping[str, float] | None = None
) -> Callable[[str], dict[str, Tensor]]:
    """Rest-of-World by client: ``(Σ_j w_j c_j − w_i c_i) / (Σ_j w_j − w_i)``, made when asked for.

    Args:
        updates: what counts, by client id.
        weights: by client id, such as its number of examples; all 1 by default.

    Returns:
        A function of a client's id. A client that was not counted gets the mean of all, one that
        alone was counted gets zeros.
    """
    weight = weights or dict.fromkeys(updates, 1.0)
    total = _sum(list(updates), updates, weight)
    whole = sum(weight[client] for client in updates)
    dtypes = {name: c.dtype for name, c in next(iter(updates.values())).items()}

    def row(client: str) -> dict[str, Tensor]:
        if client not in updates:
            return {name: (t / whole).to(dtypes[name]) for name, t in total.items()}
        if len(updates) == 1:
            return {name: torch.zeros_like(t, dtype=dtypes[name]) for name, t in total.items()}
        if len(updates) == 2:  # the other's bits, which a sum need not give back
            (other,) = updates.keys() - {client}
            return {name: c.clone() for name, c in updates[other].items()}
        own, left = updates[client], whole - weight[client]
        return {
            name: ((t - own[name].double() * weight[client]) / left).to(dtypes[name])
            for name, t in total.items()
        }

    return row


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
    ids = [str(i) for i in range(len(updates))]
    total = _sum(ids, dict(zip(ids, updates, strict=True)), dict(zip(ids, weights, strict=True)))
    return {name: (total[name] / sum(weights)).to(c.dtype) for name, c in updates[0].items()}


def _sum(
    ids: Sequence[str], updates: Mapping[str, Update], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    total: dict[str, Tensor] | None = None
    for client in ids:
        update = dict(updates[client])
        if total is None:
            total = {name: torch.zeros_like(c, dtype=torch.float64) for name, c in update.items()}
        if update.keys() != total.keys():
            name = sorted(update.keys() ^ total.keys())[0]
            raise ValueError(f"updates {ids[0]} and {client} do not both hold {name}")
        for name, c in update.items():
            if c.shape != total[name].shape:
                shapes = f"{tuple(total[name].shape)} and {tuple(c.shape)}"
                raise ValueError(f"{name}: updates {ids[0]} and {client} have shapes {shapes}")
            total[name].add_(c.double(), alpha=weights[client])
    return total or {}

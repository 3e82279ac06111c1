"""Aggregation: adapters in, adapters out. Pure functions; sums are fp64 in the order given.

An update is a mapping from names to tensors, such as a client's individual adapters; all updates
have the same names and shapes. They may be read from disk one at a time: a mean holds one sum and
one update, never all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Total:
    """``S = Σ_j w_j c_j``, all that a client needs of the others.

    Attributes:
        sums: by name, fp64.
        weight: ``Σ_j w_j``.
        count: how many updates are in it.
        dtypes: by name, that of the updates.
    """

    sums: Mapping[str, Tensor]
    weight: float
    count: int
    dtypes: Mapping[str, torch.dtype]


def total(updates: Mapping[str, Update], weights: Mapping[str, float] | None = None) -> Total:
    """The sum of one update or more, fp64, in the order given.

    Args:
        updates: what counts, by client id.
        weights: by client id, such as its number of examples; all 1 by default.

    Raises:
        ValueError: names or shapes that differ.
    """
    weight = weights or dict.fromkeys(updates, 1.0)
    sums = _sum(list(updates), updates, weight)
    whole = sum(weight[client] for client in updates)
    dtypes = {name: c.dtype for name, c in next(iter(updates.values())).items()}
    return Total(sums, whole, len(updates), dtypes)


def row_of(total: Total, own: Update | None = None, weight: float = 1.0) -> dict[str, Tensor]:
    """A Rest-of-World: ``(S − w_i c_i) / (Σ_j w_j − w_i)``, each number rounded once.

    Args:
        total: of all that counts.
        own: exactly what is in the sum of the client itself; None: nothing is, and it gets the
            mean of all.
        weight: of ``own``. Who alone was counted gets zeros.
    """
    if own is None:
        whole = total.weight
        return {name: (t / whole).to(total.dtypes[name]) for name, t in total.sums.items()}
    if total.count == 1:
        return {n: torch.zeros_like(t, dtype=total.dtypes[n]) for n, t in total.sums.items()}
    left = total.weight - weight
    return {
        name: ((t - own[name].double() * weight) / left).to(total.dtypes[name])
        for name, t in total.sums.items()
    }


def leave_one_out(
    updates: Mapping[str, Update], weights: Mapping[str, float] | None = None
) -> Callable[[str], dict[str, Tensor]]:
    """Rest-of-World by client, as ``row_of`` has it, made when asked for.

    Args:
        updates: what counts, by client id.
        weights: by client id, such as its number of examples; all 1 by default.

    Returns:
        A function of a client's id. A client that was not counted gets the mean of all.
    """
    weight = weights or dict.fromkeys(updates, 1.0)
    whole = total(updates, weight)

    def row(client: str) -> dict[str, Tensor]:
        if client not in updates:
            return row_of(whole)
        if len(updates) == 2:  # the other's bits, which a sum need not give back
            (other,) = updates.keys() - {client}
            return {name: c.clone() for name, c in updates[other].items()}
        return row_of(whole, updates[client], weight[client])

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
    if len(ids) == 1:  # its own bits, negative zeros among them
        return {name: c.double() * weights[ids[0]] for name, c in updates[ids[0]].items()}
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

"""Gradients of single records from one pass over their batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedalt.model import State, own_adapters
from fedalt.training.micro import Count, Loss


def record_gradients(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    batch: Sequence[Any],
    loss: Loss,
    count: Count,
) -> tuple[Tensor, State]:
    """The batch's mean loss and, by name, the gradient of each record's own loss [B, ...].

    Record i's share of the batch's mean is ``t_i / t`` of its own one, of t_i terms. Names are
    left out that no gradient reached; parameters have one where it did.

    Args:
        model: its gradients are empty.
        trained: of adapters and mixers; of one record, whatever is trained.
        batch: at least one record.

    Raises:
        HiddenRows: as ``own_adapters``.
    """
    if len(batch) == 1:
        mean = loss(model, batch)
        mean.backward()
        alone = {name: p.grad.unsqueeze(0) for name, p in trained.items() if p.grad is not None}
        return mean.detach(), alone
    with own_adapters(model, len(batch)) as copies:
        mean = loss(model, batch)
        mean.backward()
    own_terms = torch.tensor([count([record]) for record in batch], device=mean.device)
    shares = count(batch) / own_terms
    gradients = {}
    for name, copy in copies.items():
        if copy.grad is not None:
            by_row = shares.to(copy.dtype).view(-1, *[1] * (copy.ndim - 1))
            gradients[name] = copy.grad.mul_(by_row)
    return mean.detach(), gradients

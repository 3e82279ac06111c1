"""One training step's gradient, as many examples at a time as memory holds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Sequence[Any]], Tensor]
"""The mean loss of a batch of examples, for its gradient."""

Count = Callable[[Sequence[Any]], int]
"""How many terms that mean is over: a batch's answer tokens, or its images."""


def largest_gradient(
    model: nn.Module, batch: Sequence[Any], loss: Loss, count: Count, size: int | None
) -> tuple[Tensor, int | None]:
    """The gradient of the batch's mean loss, added up over parts of ``size`` examples.

    Where memory does not suffice, in the forward or the backward, what was added is dropped, the
    size is halved and the same step is run again, from the random state at its start.

    Args:
        model: its gradients are empty.
        size: None, or as many as there are: the batch in one.

    Returns:
        The mean loss, and the size that fitted: the one given, unless that was too large.

    Raises:
        The error of a single example that does not fit, or any other one.
    """
    device = next(model.parameters()).device
    before = _random_state(device)
    while True:
        ran = len(batch) if size is None else min(size, len(batch))
        try:
            return accumulate(model, batch, loss, count, ran), size
        except (RuntimeError, MemoryError) as error:
            if ran == 1 or not out_of_memory(error):
                raise
        # Out of the except clause the error is gone, and with it the frames that hold tensors.
        size = (ran + 1) // 2
        model.zero_grad(set_to_none=True)
        free_memory(model)
        _set_random_state(device, before)


def accumulate(
    model: nn.Module, batch: Sequence[Any], loss: Loss, count: Count, size: int
) -> Tensor:
    """Adds to the gradients that of ``Σ_p (n_p / n) loss_p``, the batch's mean loss, and gives it.

    The parts p have ``size`` examples, the last one what is left; n_p of n terms are in part p.
    Each part's graph is freed before the next is made.
    """
    if size >= len(batch):
        whole = loss(model, batch)
        whole.backward()
        return whole.detach()
    terms = count(batch)
    shares = []
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        share = loss(model, part) * (count(part) / terms)
        share.backward()
        shares.append(share.detach())
    return torch.stack(shares).sum()


def free_memory(model: nn.Module) -> None:
    """Give back what nothing holds any more, on the model's device too."""
    gc.collect()
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or on the host."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    told = any(word in str(error) for word in words)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or told


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    on_device = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return torch.get_rng_state(), *on_device


def _set_random_state(device: torch.device, states: tuple[Tensor, ...]) -> None:
    host, *on_device = states
    torch.set_rng_state(host)
    for state in on_device:
        torch.cuda.set_rng_state(state, device)

"""Local training of many clients for one round, in one pass over the frozen base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fedalt.config import TrainConfig
from fedalt.model import State, stacked_clients, sum_dtype
from fedalt.training.activations import offloading, recomputing
from fedalt.training.client import TrainResult, batches, count_steps, schedule_of, share_of
from fedalt.training.micro import Count
from fedalt.training.optimizers import moments_of, optimizing

Losses = Callable[[nn.Module, Sequence[Any]], Tensor]
"""The loss of each example of a batch [B], summed over its terms."""


class NotTogether(Exception):
    """No gradient reached a layer, of whichever client: one by one it shows what that means."""


@dataclass(frozen=True)
class Trainee:
    """A client that trains beside others.

    Attributes:
        state: its adapters and mixers, of the rank that the others have.
        examples, seed, optimizer: as in ``train_client``.
    """

    state: Mapping[str, Tensor]
    examples: Sequence[Any]
    seed: int
    optimizer: Mapping[str, Tensor] | None = None


def train_together(
    model: nn.Module,
    clients: Sequence[Trainee],
    config: TrainConfig,
    losses: Losses,
    *,
    trains: Sequence[Sequence[str]],
    length: Callable[[Any], int],
    count: Count = len,
    on_step: Callable[[], None] = lambda: None,
) -> list[tuple[State, TrainResult]]:
    """What ``train_client`` makes of each client, but for rounding, in one pass a step for all.

    With client c's batch of n_c terms, a step's backward is that of ``Σ_c (1 / n_c) Σ loss``, of
    which every client's tensors get the gradient of their own mean alone. Batches, dropout of the
    adapters, clipping, AdamW and its schedule are the client's own; who has fewer steps leaves.
    Dropout of the base's own draws other masks than it would alone.

    Args:
        model: it has the same adapters afterwards, and in them what it had before.
        clients: whose rows stand in this order in every batch.
        losses: called in training mode.
        length: the tokens that an example makes; shorter ones are padded on the left.
        trains, count, on_step: as in ``train_client``.

    Returns:
        By client, its state after the round and what it tells.

    Raises:
        NotTogether: a layer that is trained got no gradient.
        HiddenRows: a layer sees rows in an order of its own.
    """
    device = next(model.parameters()).device
    forward = offloading(model, config.offload_activations)

    def offloaded(model: nn.Module, batch: Sequence[Any]) -> Tensor:
        with forward:
            return losses(model, batch)

    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            stacked_clients(
                model,
                [client.state for client in clients],
                [client.seed for client in clients],
                recomputes=config.gradient_checkpointing,
            ) as stacked,
            recomputing(model, config.gradient_checkpointing),
        ):
            torch.manual_seed(clients[0].seed)
            seats = [_Seat(n, client, config, device) for n, client in enumerate(clients)]
            model.train()
            for position in range(len(trains)):
                tensors = stacked.train(trains[position])
                with ExitStack() as stack:
                    for seat in seats:
                        seat.sit(stack, tensors, len(trains), position)
                    left = seats if tensors else []
                    while left := [seat for seat in left if seat.left]:
                        drawn = {seat.number: next(seat.stream) for seat in left}
                        with stacked.step(_sizes(drawn, length)):
                            means = _backward(model, drawn.values(), offloaded, count)
                        if any(tensor.grad is None for tensor in tensors.values()):
                            raise NotTogether
                        for seat, mean in zip(left, means, strict=True):
                            seat.step(tensors, mean)
                            on_step()
                        for tensor in tensors.values():
                            tensor.grad = None
                    for seat in seats:
                        seat.rise()
            return [(seat.state(stacked.tensors), seat.result()) for seat in seats]
    finally:
        model.eval()


def _sizes(
    drawn: Mapping[int, Sequence[Any]], length: Callable[[Any], int]
) -> dict[int, tuple[int, int]]:
    """Of each client's batch, how many examples it has and the tokens of the longest."""
    return {number: (len(batch), max(map(length, batch))) for number, batch in drawn.items()}


def _backward(
    model: nn.Module, batches: Collection[Sequence[Any]], losses: Losses, count: Count
) -> list[Tensor]:
    """The mean loss of each client's batch, and its gradient in what is the client's own."""
    whole = [example for batch in batches for example in batch]
    parts = losses(model, whole).split([len(batch) for batch in batches])
    means = [part.sum() / count(batch) for part, batch in zip(parts, batches, strict=True)]
    torch.stack(means).sum().backward()
    return [mean.detach() for mean in means]


class _Seat:
    """What a client has of its own, its tensors being rows of the stacked ones."""

    def __init__(
        self, number: int, client: Trainee, config: TrainConfig, device: torch.device
    ) -> None:
        self.number, self._client, self._config = number, client, config
        order = torch.Generator().manual_seed(client.seed)
        self.stream: Iterator[list[Any]] = batches(client.examples, config, order)
        self.left, self._done, self._moments = 0, 0, dict[str, Tensor]()
        self._total = torch.zeros((), dtype=sum_dtype(device), device=device)

    def sit(
        self, stack: ExitStack, tensors: Mapping[str, Tensor], groups: int, position: int
    ) -> None:
        """Begin a group of parts: its share of the steps, AdamW over its rows, its schedule."""
        config, client = self._config, self._client
        steps = count_steps(len(client.examples), config)
        self.left = share_of(steps, position, groups) if tensors else 0
        self._own = {n: nn.Parameter(t.detach()[self.number]) for n, t in tensors.items()}
        if self.left:
            own = optimizing(self._own, config, client.optimizer or {})
            self._adamw = stack.enter_context(own)
            self._schedule = LambdaLR(self._adamw, schedule_of(self.left, config))

    def step(self, tensors: Mapping[str, Tensor], loss: Tensor) -> None:
        for name, own in self._own.items():
            grad = tensors[name].grad
            own.grad = None if grad is None else grad[self.number]
        torch.nn.utils.clip_grad_norm_(self._own.values(), self._config.max_grad_norm)
        self._adamw.step()
        self._schedule.step()
        self._total += loss
        self.left, self._done = self.left - 1, self._done + 1

    def rise(self) -> None:
        """End a group of parts."""
        if self._client.optimizer is not None and self._own:
            self._moments |= moments_of(self._own, self._adamw)

    def state(self, stacked: Mapping[str, Tensor]) -> State:
        own = {name: stacked[name].detach()[self.number] for name in self._client.state}
        return {name: tensor.to("cpu", copy=True) for name, tensor in own.items()}

    def result(self) -> TrainResult:
        mean = self._total.item() / max(self._done, 1)
        return TrainResult(mean, self._done, self._moments)

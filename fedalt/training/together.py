"""Local training of many clients for one round, in one pass over the frozen base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fedalt.config import TrainConfig
from fedalt.model import State, is_part, stacked_clients, sum_dtype
from fedalt.training.activations import offloading, recomputing
from fedalt.training.client import TrainResult, batches, count_steps, schedule_of, share_of
from fedalt.training.micro import Count
from fedalt.training.optimizers import moments_of, optimizing
from fedalt_kernels import GroupedMixedLoRALinear

Losses = Callable[[nn.Module, Sequence[Any]], Tensor]
"""The loss of each example of a batch [B], summed over its terms."""

Layers = Mapping[str, GroupedMixedLoRALinear]


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
        trains, count, on_step: as in ``train_client``.

    Returns:
        By client, its state after the round and what it tells.

    Raises:
        NotTogether: a layer that is trained got no gradient.
        HiddenRows: a layer sees rows in an order of its own.
    """
    device = next(model.parameters()).device
    forward = offloading(model, config.offload_activations)
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            stacked_clients(model, [client.state for client in clients]) as (rows, layers),
            recomputing(model, config.gradient_checkpointing),
        ):
            torch.manual_seed(clients[0].seed)
            seats = [_Seat(n, client, config, device) for n, client in enumerate(clients)]
            masks = _Masks(layers, seats, device, again=config.gradient_checkpointing)
            model.train()
            for position in range(len(trains)):
                tensors = _trainable(layers, trains[position])
                with ExitStack() as stack:
                    for seat in seats:
                        seat.sit(stack, tensors, len(trains), position)
                    left = seats if tensors else []
                    while left := [seat for seat in left if seat.left]:
                        drawn = [next(seat.stream) for seat in left]
                        batch = [example for own in drawn for example in own]
                        owners = [s.number for s, own in zip(left, drawn, strict=True) for _ in own]
                        masks.forget()
                        with rows.of(owners):
                            with forward:
                                each = losses(model, batch).split([len(own) for own in drawn])
                            means = [
                                part.sum() / count(own)
                                for part, own in zip(each, drawn, strict=True)
                            ]
                            torch.stack(means).sum().backward()
                        if any(tensor.grad is None for tensor in tensors.values()):
                            raise NotTogether
                        for seat, mean in zip(left, means, strict=True):
                            seat.step(tensors, mean.detach())
                            on_step()
                        for tensor in tensors.values():
                            tensor.grad = None
                    for seat in seats:
                        seat.rise()
            return [(seat.state(layers), seat.result()) for seat in seats]
    finally:
        model.eval()


class _Seat:
    """What a client has of its own, its tensors being rows of the stacked ones."""

    def __init__(
        self, number: int, client: Trainee, config: TrainConfig, device: torch.device
    ) -> None:
        self.number, self._client, self._config = number, client, config
        order = torch.Generator().manual_seed(client.seed)
        self.stream: Iterator[list[Any]] = batches(client.examples, config, order)
        self.dropout = torch.Generator(device).manual_seed(client.seed)
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

    def state(self, layers: Layers) -> State:
        stacked = _tensors(layers)
        own = {name: stacked[name].detach()[self.number] for name in self._client.state}
        return {name: tensor.to("cpu", copy=True) for name, tensor in own.items()}

    def result(self) -> TrainResult:
        mean = self._total.item() / max(self._done, 1)
        return TrainResult(mean, self._done, self._moments)


class _Masks:
    """The seeds of every layer's dropout: of each client, those that it would draw alone."""

    def __init__(
        self, layers: Layers, seats: Sequence[_Seat], device: torch.device, again: bool
    ) -> None:
        """``again``: a layer is called once more in the backward, with the same masks."""
        self._seats, self._device, self._again = seats, device, again
        self._drawn: dict[nn.Module, Tensor] = {}
        for layer in layers.values():
            if layer.dropout:
                layer.register_forward_pre_hook(self._seed, with_kwargs=True)

    def forget(self) -> None:
        """A new step begins."""
        self._drawn.clear()

    def _seed(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seeds = self._drawn.get(layer)
        if seeds is None:
            seeds = torch.stack(
                [
                    torch.randint(2**63 - 1, (), generator=seat.dropout, device=self._device)
                    for seat in self._seats
                ]
            )
            if self._again:
                self._drawn[layer] = seeds
        return args, {**kwargs, "seeds": seeds}


def _tensors(layers: Layers) -> dict[str, nn.Parameter]:
    """Every stacked tensor [C, ...], by the name it has in a state."""
    return {
        f"{prefix}.{name}": tensor
        for prefix, layer in layers.items()
        for name, tensor in layer.named_parameters()
        if not name.startswith("base.")
    }


def _trainable(layers: Layers, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let the tensors of ``parts``, and no others, ask for a gradient; these."""
    stacked = _tensors(layers)
    for name, tensor in stacked.items():
        tensor.requires_grad_(any(is_part(name, part) for part in parts))
    return {name: tensor for name, tensor in stacked.items() if tensor.requires_grad}

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
from fedalt.model import ClientRows, State, is_part, stacked_clients, sum_dtype
from fedalt.training.activations import offloading, recomputing
from fedalt.training.client import TrainResult, batches, count_steps, schedule_of, share_of
from fedalt.training.micro import Count
from fedalt.training.optimizers import moments_of, optimizing
from fedalt_kernels import GroupedMixedLoRALinear, Segments

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
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            stacked_clients(model, [client.state for client in clients]) as (rows, layers),
            recomputing(model, config.gradient_checkpointing),
        ):
            torch.manual_seed(clients[0].seed)
            seats = [_Seat(n, client, config, device) for n, client in enumerate(clients)]
            seen = _Rows(layers, seats, rows, again=config.gradient_checkpointing)
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
                        sizes = {
                            seat.number: (len(own), max(map(length, own)))
                            for seat, own in zip(left, drawn, strict=True)
                        }
                        seen.begin(sizes, device)
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


class _Rows:
    """What every adapted layer sees of a step: of each client the rows that it would have alone.

    Those that pad a client's rows to the length of others' are left out, so that they cost nothing
    and rows keep the numbers, and so the dropout's masks, that they have alone.
    """

    def __init__(self, layers: Layers, seats: Sequence[_Seat], rows: ClientRows, again: bool):
        """``again``: a layer is called once more in the backward, with the same masks."""
        self._seats, self._rows, self._again = seats, rows, again
        self._shape: torch.Size | None = None  # of the rows of a layer's call that is narrowed
        self._seeds: dict[nn.Module, Tensor] = {}
        self._all, self._kept, self._segments = 0, torch.empty(0), Segments((), None, None)
        for layer in layers.values():
            layer.register_forward_pre_hook(self._narrow, with_kwargs=True)
            layer.register_forward_hook(self._widen)

    def begin(self, sizes: Mapping[int, tuple[int, int]], device: torch.device) -> None:
        """A new step, of so many examples and tokens an example by client; padded on the left."""
        self._seeds.clear()
        longest, start, kept = max(tokens for _, tokens in sizes.values()), 0, []
        rows = [0] * len(self._seats)
        for number, (examples, tokens) in sizes.items():
            block = torch.arange(start, start + examples * longest).view(examples, longest)
            kept.append(block[:, longest - tokens :].flatten())
            start, rows[number] = start + block.numel(), examples * tokens
        self._kept = torch.cat(kept).to(device)
        self._all = start if start > len(self._kept) else 0
        self._segments = Segments(tuple(rows), None, None)

    def _narrow(
        self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        (x,) = args
        told: dict[str, Any] = {"clients": self._rows(x)}
        if layer.training and layer.dropout:
            told["seeds"] = self._seeds_of(layer, x.device)
        self._shape = x.shape[:-1] if x.shape[:-1].numel() == self._all else None
        if self._shape is not None:
            x, told["clients"] = x.flatten(0, -2).index_select(0, self._kept), self._segments
        return (x,), told

    def _widen(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if self._shape is None:
            return y
        wide = y.new_zeros(self._all, y.shape[-1]).index_copy(0, self._kept, y)
        return wide.view(*self._shape, -1)

    def _seeds_of(self, layer: nn.Module, device: torch.device) -> Tensor:
        """Of each client, the seed that it would draw alone."""
        if layer in self._seeds:
            return self._seeds[layer]
        drawn = [
            torch.randint(2**63 - 1, (), generator=seat.dropout, device=device)
            for seat in self._seats
        ]
        if self._again:
            self._seeds[layer] = torch.stack(drawn)
        return torch.stack(drawn)


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

"""Local training of one client for one round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fedalt.config import PrivacyConfig, TrainConfig
from fedalt.model import State, set_trainable, sum_dtype
from fedalt.training.activations import offloading, recomputing
from fedalt.training.micro import Count, Loss, largest_gradient
from fedalt.training.optimizers import moments_of, optimizing
from fedalt.training.private import PrivateSteps
from fedalt.training.unused import UnusedWatch


@dataclass(frozen=True)
class TrainResult:
    """What a client tells of its round.

    Attributes:
        loss: the mean over its steps, in nats (a token).
        steps: optimizer steps taken; 0 where there was nothing to train.
        optimizer: AdamW's moments by tensor name, in host memory, where they were asked for.
        micro_batch: the examples that memory held at once, or None: it held every batch whole.
    """

    loss: float
    steps: int
    optimizer: State = field(default_factory=dict)
    micro_batch: int | None = None


def train_client(
    model: nn.Module,
    examples: Sequence[Any],
    config: TrainConfig,
    loss: Loss,
    *,
    trains: Sequence[Sequence[str]],
    seed: int,
    count: Count = len,
    optimizer: Mapping[str, Tensor] | None = None,
    privacy: PrivacyConfig | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Train, in place, the named parts of ``model``, which holds the client's state.

    Batch order and dropout come from ``seed`` alone, so a round can be run again from its start.
    AdamW's schedule starts afresh, and so do its moments unless they are handed in.

    Args:
        model: with the client's adapters loaded.
        examples: the client's train records.
        loss: of a batch or a part of one; it is called in training mode.
        trains: the parts to train. Several groups share the round's steps, one after the other.
        seed: of this client's round, as from ``cohort.derive_seed``.
        count: the terms that ``loss`` is the mean of, by which parts of a batch are weighted.
        optimizer: the moments of an earlier ``TrainResult``, or an empty mapping to begin with;
            None where nobody keeps them.
        privacy: where it is on, steps are those of ``PrivateSteps``.
        on_step: called after every step, for progress.

    Raises:
        UnusedLayers: after the first backward, of layers whose adapters no gradient reached.
    """
    steps = count_steps(len(examples), config)
    order = torch.Generator().manual_seed(seed)
    stream = batches(examples, config, order)
    device = next(model.parameters()).device
    total, moments, done, size = (
        torch.zeros((), dtype=sum_dtype(device), device=device),
        dict[str, Tensor](),
        0,
        config.micro_batch,
    )
    forward = offloading(model, config.offload_activations)

    def offloaded(model: nn.Module, batch: Sequence[Any]) -> Tensor:
        with forward:
            return loss(model, batch)

    private = None
    if privacy is not None and privacy.on:
        at_once = 1 if config.packing else config.micro_batch or config.batch_size
        private = PrivateSteps(examples, config.batch_size, privacy, offloaded, count, at_once)
    model.train()
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            recomputing(model, config.gradient_checkpointing),
        ):
            torch.manual_seed(seed)
            for position, parts in enumerate(trains):
                share = share_of(steps, position, len(trains))
                set_trainable(model, parts)
                trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
                if not trained or not share:
                    continue
                watch = UnusedWatch(model)
                with optimizing(trained, config, optimizer or {}) as adamw:
                    schedule = LambdaLR(adamw, schedule_of(share, config))
                    for _ in range(share):
                        if private:
                            batch = private.batch()
                            step_loss = private.gradient(model, trained, batch, watch.look)
                        else:
                            batch = next(stream)
                            step_loss, size = largest_gradient(model, batch, offloaded, count, size)
                            watch.look()
                            torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
                        adamw.step()
                        schedule.step()
                        adamw.zero_grad(set_to_none=True)
                        total += step_loss
                        on_step()
                    watch.tell()
                    done += share
                    if optimizer is not None:
                        moments |= moments_of(trained, adamw)
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
    return TrainResult(total.item() / max(done, 1), done, moments, size)


def share_of(steps: int, position: int, groups: int) -> int:
    """Of a round's steps, those of one of several groups of parts, by its position."""
    return steps * (position + 1) // groups - steps * position // groups


def count_steps(examples: int, config: TrainConfig) -> int:
    """Optimizer steps of one client's round."""
    return config.max_steps or config.epochs * math.ceil(examples / config.batch_size)


def schedule_of(steps: int, config: TrainConfig) -> Callable[[int], float]:
    """The factor of the learning rate at each of so many steps."""
    return lambda step: learning_rate_factor(step, steps, config)


def learning_rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """The share of ``learning_rate`` at ``step`` of ``steps``: a linear rise, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    left = (steps - step) / max(1, steps - config.warmup_steps)
    shapes = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}
    return shapes[config.lr_scheduler]


def batches(
    examples: Sequence[Any], config: TrainConfig, order: torch.Generator
) -> Iterator[list[Any]]:
    """Batches of one shuffled pass after another, without end."""
    while True:
        shuffled = torch.randperm(len(examples), generator=order).tolist()
        for start in range(0, len(shuffled), config.batch_size):
            yield [examples[i] for i in shuffled[start : start + config.batch_size]]

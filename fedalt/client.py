"""Local training of one client for one round."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fedalt.config import TrainConfig
from fedalt.data.tokens import Example, collate
from fedalt.loss import answer_loss


@dataclass(frozen=True)
class TrainResult:
    """What a client tells of its round: the mean loss over its steps, in nats a token."""

    loss: float
    steps: int


def train_client(
    model: nn.Module,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    seed: int,
    pad_id: int,
    on_step: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Train, in place, whatever in ``model`` asks for a gradient.

    Batch order and dropout come from ``seed`` alone, so a round can be run again from its start.
    AdamW and its schedule start afresh.

    Args:
        model: with the client's adapters loaded.
        examples: the client's train records.
        seed: of this client's round, as from ``derive_seed``.
        pad_id: the token that fills short rows.
        on_step: called after every step, for progress.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    steps = count_steps(len(examples), config)
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, config))
    order = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64, device=device)
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _, batch in zip(range(steps), batches(examples, config, order), strict=False):
            loss = answer_loss(model, collate(batch, pad_id, device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            on_step()
    model.eval()
    return TrainResult(loss=total.item() / steps, steps=steps)


def count_steps(examples: int, config: TrainConfig) -> int:
    """Optimizer steps of one client's round."""
    return config.max_steps or config.epochs * math.ceil(examples / config.batch_size)


def learning_rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """The share of ``learning_rate`` at ``step`` of ``steps``: a linear rise, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    left = (steps - step) / max(1, steps - config.warmup_steps)
    shapes = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}
    return shapes[config.lr_scheduler]


def derive_seed(seed: int, round_number: int, client_id: str) -> int:
    """A 63-bit seed that belongs to one client's round, whatever ran before it."""
    digest = hashlib.sha256(f"{seed}/{round_number}/{client_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def batches(
    examples: Sequence[Example], config: TrainConfig, order: torch.Generator
) -> Iterator[list[Example]]:
    """Batches of one shuffled pass after another, without end."""
    while True:
        shuffled = torch.randperm(len(examples), generator=order).tolist()
        for start in range(0, len(shuffled), config.batch_size):
            yield [examples[i] for i in shuffled[start : start + config.batch_size]]

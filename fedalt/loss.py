"""The losses: cross entropy of the answers, prompts masked out, or of the images' classes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedalt.data.tokens import IGNORED, Batch


def answer_loss(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    """Cross entropy of the answers' tokens in nats: ``mean`` over them, or their ``sum``."""
    losses = token_losses(model, batch)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (batch.labels[:, 1:] != IGNORED).sum()


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy in nats [B, T - 1] of every answer's tokens, zero elsewhere.

    Logits are made at the answers alone: the batch is left-padded, so its last T positions hold
    every answer and the token before it.
    """
    kept = batch.labels.shape[1]
    inputs: dict[str, Any] = {**batch.inputs(), "use_cache": False}
    accepted = inspect.signature(model.forward).parameters
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = kept
    if "position_ids" not in accepted:
        del inputs["position_ids"]
    logits = model(**inputs).logits[:, -kept:-1]
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return losses.view(logits.shape[:2])


def class_loss(model: nn.Module, pixels: Tensor, labels: Sequence[int]) -> Tensor:
    """Mean cross entropy of the classes in nats.

    Args:
        model: an image classifier.
        pixels: [B, C, H, W], as its processor makes them.
        labels: by row, the class's row in the model's head.
    """
    weight = next(model.parameters())
    logits = model(pixel_values=pixels.to(weight.device, weight.dtype)).logits
    return nn.functional.cross_entropy(logits.float(), torch.tensor(labels, device=logits.device))

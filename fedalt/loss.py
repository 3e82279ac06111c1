"""The loss of training and of evaluation: cross entropy of the answers, prompts masked out."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from fedalt.data.tokens import IGNORED, Batch


def answer_loss(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    """Cross entropy of the answers' tokens in nats; logits are made at the answers alone.

    Args:
        batch: left-padded, so the last T positions hold every answer and the token before it.
        reduction: ``mean`` over the answers' tokens, or ``sum``.
    """
    kept = batch.labels.shape[1]
    inputs: dict[str, Any] = {**batch.inputs(), "use_cache": False}
    accepted = inspect.signature(model.forward).parameters
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = kept
    if "position_ids" not in accepted:
        del inputs["position_ids"]
    logits = model(**inputs).logits[:, -kept:-1]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction=reduction,
    )

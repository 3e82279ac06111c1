"""The losses: cross entropy of the answers, prompts masked out, or of the images' classes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedalt.data import IGNORED, Batch

MOST_LOGITS = 2**24
"""Logits that are made at once where nobody says of how many tokens."""


def answer_loss(
    model: nn.Module, batch: Batch, reduction: str = "mean", chunk: int | None = None
) -> Tensor:
    """Cross entropy of the answers' tokens in nats: ``mean`` over them, or their ``sum``.

    On a GPU where Liger-Kernel is installed, its fused loss takes the place of the chunks.
    """
    chunked = _chunks(model, batch, chunk)
    fused = _fused_loss(chunked[0], batch.labels.device) if chunked else None
    if chunked and fused and torch.is_grad_enabled():
        head = chunked[0]
        hidden, labels, _ = _at_answers(model, head, batch)
        total = fused(head.weight, hidden, labels, head.bias)
    else:
        total = token_losses(model, batch, chunk).sum()
    return total if reduction == "sum" else total / (batch.labels[:, 1:] != IGNORED).sum()


def token_losses(model: nn.Module, batch: Batch, chunk: int | None = None) -> Tensor:
    """Cross entropy in nats [B, T - 1] of every answer's tokens, zero elsewhere.

    Logits are made at the answers alone: the batch is left-padded, so its last T positions hold
    every answer and the token before it. Where these are more than ``chunk``, the answers' own
    tokens get theirs ``chunk`` at a time, and once more in the backward, so that the loss takes
    about 16 bytes x chunk x vocabulary at its peak. All at once they are made for a model that
    ``mark_chunkable`` has not found to allow for it.

    Args:
        model: a causal language model.
        chunk: tokens; None: as many as make 2^24 logits.
    """
    if chunked := _chunks(model, batch, chunk):
        return _losses_in_chunks(model, batch, *chunked)
    logits = model(**_inputs(model, batch)).logits[:, -batch.labels.shape[1] : -1]
    losses = _cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
    return losses.view(logits.shape[:2])


def _chunks(model: nn.Module, batch: Batch, chunk: int | None) -> tuple[Any, int] | None:
    """The head and the tokens of a chunk; None where all logits are made at once."""
    positions = batch.labels.shape[0] * (batch.labels.shape[1] - 1)
    if not getattr(model, "fedalt_chunkable", False):
        return None
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    # Where an adapted head is only scored, somebody may watch its gates at every position.
    if not (isinstance(head, nn.Linear) or torch.is_grad_enabled()):
        return None
    chunk = chunk or max(1, MOST_LOGITS // head.out_features)
    return (head, chunk) if positions > chunk else None


def _fused_loss(head: nn.Module, device: torch.device) -> Any:
    """Liger-Kernel's summed loss for a plain frozen head on a GPU, where it is installed."""
    plain = type(head) is nn.Linear and not head.weight.requires_grad
    if device.type != "cuda" or not plain:
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")


def _at_answers(model: nn.Module, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What the head is given [n, width] for the n tokens that count, these, and where they are."""
    targets = batch.labels[:, 1:]
    counted = targets != IGNORED
    with _tapped(head) as given:
        model(**_inputs(model, batch))
    return given[0][:, -batch.labels.shape[1] : -1][counted], targets[counted], counted


def _losses_in_chunks(model: nn.Module, batch: Batch, head: nn.Module, chunk: int) -> Tensor:
    hidden, labels, counted = _at_answers(model, head, batch)
    losses = [
        checkpoint(_losses_of_chunk, head, *part, use_reentrant=False)
        if torch.is_grad_enabled()
        else _losses_of_chunk(head, *part)
        for part in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    flat = torch.cat(losses)
    return flat.new_zeros(counted.shape).masked_scatter(counted, flat)


@contextmanager
def _tapped(head: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts the head makes one position's logits; the list gets all that it was given."""
    given: list[Tensor] = []

    def tap(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given.append(inputs[0])
        return inputs[0][:, :1], *inputs[1:]

    with head.register_forward_pre_hook(tap, prepend=True):
        yield given


def _losses_of_chunk(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return _cross_entropy(head(hidden), labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="none")


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the forward takes of the batch."""
    inputs: dict[str, Any] = {**batch.inputs(), "use_cache": False}
    accepted = inspect.signature(model.forward).parameters
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = batch.labels.shape[1]
    if "position_ids" not in accepted:
        del inputs["position_ids"]
    return inputs


def class_loss(
    model: nn.Module, pixels: Tensor, labels: Sequence[int], reduction: str = "mean"
) -> Tensor:
    """Mean cross entropy of the classes in nats.

    Args:
        model: an image classifier.
        pixels: [B, C, H, W], as its processor makes them.
        labels: by row, the class's row in the model's head.
        reduction: ``none``: of each image [B].
    """
    weight = next(model.parameters())
    logits = model(pixel_values=pixels.to(weight.device, weight.dtype)).logits
    wanted = torch.tensor(labels, device=logits.device)
    return nn.functional.cross_entropy(logits.float(), wanted, reduction=reduction)

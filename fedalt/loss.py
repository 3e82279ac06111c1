"""The losses: cross entropy of the answers, prompts masked out, or of the images' classes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedalt.data.tokens import IGNORED, Batch

MOST_LOGITS = 2**24
"""Logits that are made at once where nobody says of how many tokens."""


def answer_loss(
    model: nn.Module, batch: Batch, reduction: str = "mean", chunk: int | None = None
) -> Tensor:
    """Cross entropy of the answers' tokens in nats: ``mean`` over them, or their ``sum``."""
    losses = token_losses(model, batch, chunk)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (batch.labels[:, 1:] != IGNORED).sum()


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
    positions = batch.labels.shape[0] * (batch.labels.shape[1] - 1)
    if getattr(model, "fedalt_chunkable", False):
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        # Where an adapted head is only scored, somebody may watch its gates at every position.
        if not (isinstance(head, nn.Linear) or torch.is_grad_enabled()):
            chunk = positions
        chunk = chunk or max(1, MOST_LOGITS // head.out_features)
        if positions > chunk:
            return _losses_in_chunks(model, head, batch, chunk)
    logits = model(**_inputs(model, batch)).logits[:, -batch.labels.shape[1] : -1]
    losses = _cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
    return losses.view(logits.shape[:2])


@torch.no_grad()
def mark_chunkable(model: nn.Module) -> None:
    """Finds out, by a forward of two tokens, whether the logits are what the model's head makes.

    A model that does more to them, such as a soft cap or a scale, must make them itself.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    model.fedalt_chunkable = False  # type: ignore[assignment]
    if isinstance(head, nn.Linear):
        seen: dict[str, Tensor] = {}

        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen["hidden"], seen["logits"] = inputs[0], output

        ids = torch.zeros(1, 2, dtype=torch.int64, device=head.weight.device)
        with head.register_forward_hook(watch):
            logits = model(input_ids=ids, use_cache=False).logits
        same = seen["hidden"].shape[:2] == ids.shape and torch.equal(
            seen["logits"].float(), logits.float()
        )
        model.fedalt_chunkable = same  # type: ignore[assignment]


def _losses_in_chunks(model: nn.Module, head: nn.Module, batch: Batch, chunk: int) -> Tensor:
    targets = batch.labels[:, 1:]
    counted = targets != IGNORED
    with _tapped(head) as given:
        model(**_inputs(model, batch))
    hidden = given[0][:, -batch.labels.shape[1] : -1][counted]  # [tokens that count, width]
    losses = [
        checkpoint(_losses_of_chunk, head, *part, use_reentrant=False)
        if torch.is_grad_enabled()
        else _losses_of_chunk(head, *part)
        for part in zip(hidden.split(chunk), targets[counted].split(chunk), strict=True)
    ]
    flat = torch.cat(losses)
    return flat.new_zeros(targets.shape).masked_scatter(counted, flat)


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
    return nn.functional.cross_entropy(
        logits.float(), labels, ignore_index=IGNORED, reduction="none"
    )


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the forward takes of the batch."""
    inputs: dict[str, Any] = {**batch.inputs(), "use_cache": False}
    accepted = inspect.signature(model.forward).parameters
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = batch.labels.shape[1]
    if "position_ids" not in accepted:
        del inputs["position_ids"]
    return inputs


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

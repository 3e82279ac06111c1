"""Whether a model's logits are what its output head makes, so that they can be made in chunks."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def mark_chunkable(model: nn.Module) -> None:
    """Finds out whether a model's logits are what its head makes, from a forward of two tokens.

    A model that does more to them, such as a soft cap or a scale, must make them itself: numbers
    that are put in the place of the head's come out changed.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    model.fedalt_chunkable = False  # type: ignore[assignment]
    if not isinstance(head, nn.Linear):
        return
    seen: list[Tensor] = []

    def swap(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        numbers = torch.linspace(-100, 100, output.numel(), device=output.device)
        seen.extend((inputs[0], numbers.view_as(output).to(output.dtype)))
        return seen[1]

    ids = torch.zeros(1, 2, dtype=torch.int64, device=head.weight.device)
    with head.register_forward_hook(swap):
        logits = model(input_ids=ids, use_cache=False).logits
    untouched = torch.equal(logits.float(), seen[1].float())
    model.fedalt_chunkable = untouched and seen[0].shape[:2] == ids.shape  # type: ignore[assignment]

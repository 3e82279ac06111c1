"""The output head: whether logits are what it makes, and its rows in the form it is fast at."""

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


def gather_rows(head: nn.Module | None) -> None:
    """Have a plain head of 16 bits on a CPU copy its input rows together first.

    A model hands it the last positions of each row of a batch. PyTorch multiplies such a slice row
    by row of the batch, and in 16 bits copies the head's whole weight for each: 520 ms in place of
    9 for eight rows and a head of [49152, 576].
    """
    if isinstance(head, nn.Linear) and head.weight.is_cpu and head.weight.element_size() == 2:
        head.register_forward_pre_hook(_gathered)


def take_back(head: nn.Module) -> None:
    """Undo `gather_rows` where the head is to be adapted, whose layer reads any rows fast."""
    for key, hook in list(head._forward_pre_hooks.items()):
        if hook is _gathered:
            del head._forward_pre_hooks[key]


def _gathered(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0].contiguous(), *inputs[1:]

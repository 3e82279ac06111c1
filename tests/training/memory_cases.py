"""A tiny model with adapters that do something, batches for it, and a step's gradients."""

import torch
from torch import nn

from fedalt.data.tokens import Example, collate
from fedalt.model.states import client_tensors, set_trainable

WIDEST = 259
"""The longest sum of a step on the tiny base: over its vocabulary."""


def stirred(model: nn.Module) -> nn.Module:
    """No adapter or mixer is zero any more."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, tensor in client_tensors(model):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def some_examples(count: int) -> list[Example]:
    """Prompts and answers of different lengths."""
    draw = torch.Generator().manual_seed(5)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, WIDEST, (length,), generator=draw).tolist())

    return [Example(ids(3 + i % 5), ids(2 + i * i % 11)) for i in range(count)]


def some_batch(count: int):
    return collate(some_examples(count), 0, torch.device("cpu"))


def gradients(model: nn.Module, loss, seed: int = 7) -> dict[str, torch.Tensor]:
    """Of a training step from ``seed``, all that is trained, and the loss."""
    model.train()
    model.zero_grad()
    set_trainable(model, ("individual", "mixer", "head"))
    torch.manual_seed(seed)
    value = loss(model)
    value.backward()
    model.eval()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads) > 4
    return {"loss": value.detach(), **grads}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)

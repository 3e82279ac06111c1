"""AdamW of 32 or 8 bits, and its moments as states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedalt.config import TrainConfig
from fedalt.model import State, bitsandbytes

_free_pages: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = defaultdict(list)


def check_optimizer(config: TrainConfig) -> None:
    """``InputError`` where ``train.optimizer`` wants a package that is not installed."""
    if config.optimizer != "adamw":
        bitsandbytes(f"train.optimizer={config.optimizer}")


@contextmanager
def optimizing(
    trained: Mapping[str, nn.Parameter], config: TrainConfig, moments: Mapping[str, Tensor]
) -> Iterator[torch.optim.Optimizer]:
    """AdamW over the tensors, with the moments of those that have any, for one client's turn.

    Args:
        trained: by name, all tensors to train.
        moments: as ``moments_of`` gave them; to begin with, an empty mapping.
    """
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    adamw: torch.optim.Optimizer
    if config.optimizer == "adamw":
        adamw = torch.optim.AdamW(trained.values(), fused=True, **options)
    else:
        package = bitsandbytes(f"train.optimizer={config.optimizer}").optim
        kinds = {"adamw_8bit": package.AdamW8bit, "paged_adamw_8bit": _paged(package)}
        adamw = kinds[config.optimizer](list(trained.values()), **options)
    for key in moments:
        name, _, kind = key.rpartition(".")
        if name in trained:
            value, device = moments[key], trained[name].device
            counts = kind == "step" and not value.is_floating_point()  # as bitsandbytes does
            kept = int(value) if counts else value.to(device, copy=True)
            adamw.state[trained[name]][kind] = kept
    try:
        yield adamw
    finally:
        _take_back_pages(adamw)


def moments_of(trained: Mapping[str, nn.Parameter], adamw: torch.optim.Optimizer) -> State:
    """Copies in host memory of all that the optimizer goes on from, by tensor name and its own."""
    return {
        f"{name}.{key}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for name, parameter in trained.items()
        if parameter in adamw.state  # one that no token reached has none
        for key, value in adamw.state[parameter].items()
    }


def _take_back_pages(adamw: torch.optim.Optimizer) -> None:
    for parameter, state in adamw.state.items():
        for tensor in state.values():
            if getattr(tensor, "is_paged", False):
                _free_pages[parameter.shape, tensor.dtype, parameter.device].append(tensor)


def _paged(package: Any) -> type:
    """bitsandbytes' paged AdamW on pages of optimizers that are done with, where there are any.

    By itself it never frees one, so every client of every round would cost new ones.
    """

    class Paged(package.PagedAdamW8bit):
        def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            free = _free_pages[p.shape, dtype, p.device]
            return free.pop().zero_() if free else super().get_state_buffer(p, dtype)

    return Paged

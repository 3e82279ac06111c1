"""Many clients in one model: every adapted layer holds all of them, each row takes its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedalt.errors import InputError
from fedalt.model.states import INDIVIDUAL, mixed_layers
from fedalt_kernels import GroupedMixedLoRALinear, MixedLoRALinear, Segments


class HiddenRows(InputError):
    """A layer does not see a batch's rows in their order, so that nobody knows whose they are."""


class ClientRows:
    """Whose rows a model's layers see, told for a batch at a time.

    The model is called with a batch of rows, each of which is a client's: tokens [B, L] or images.
    Beams and the samples of one prompt lie side by side, as ``generate`` puts them.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.hook: RemovableHandle | None = None  # by which it is told of the model's calls
        self._batch: Segments | None = None
        self._calls: set[int] = set()  # rows that a layer may see flattened
        self._made: dict[tuple[int, torch.device], Segments] = {}

    @contextmanager
    def of(self, clients: Sequence[int]) -> Iterator[None]:
        """While it lasts, the batch's rows are of these clients, by number."""
        self._batch = Segments.of(clients, self._count)
        try:
            yield
        finally:
            self._batch = None
            self._made.clear()

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A hook before the model's forward: how many rows and tokens it is called with."""
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        inputs = next((each for each in tensors if each.ndim >= 2), None)
        self._calls = set() if inputs is None else {len(inputs), inputs.shape[:2].numel()}

    def __call__(self, x: Tensor) -> Segments:
        """The segments of a layer's input [B, ..., K], or flattened [B L, K]."""
        if self._batch is None:
            raise InputError("clients must be named: call the model with clients=[...]")
        if x.ndim < 3 and len(x) not in self._calls:
            raise HiddenRows(
                "lora.target_modules: a layer sees tokens in an order of its own, as experts do, "
                "so their clients are not known; use fedalt.load_client"
            )
        key = x.shape[:-1].numel(), x.device
        if key not in self._made:
            self._made[key] = self._batch.of_rows(*key)
        return self._made[key]


def whose(rows: ClientRows | None, clients: Sequence[int]) -> AbstractContextManager[None]:
    """``rows.of(clients)``, or nothing where a model has one client."""
    return nullcontext() if rows is None else rows.of(clients)


def stack_clients(model: nn.Module, states: Sequence[Mapping[str, Tensor]]) -> ClientRows:
    """Put clients, as `adapter_state` has them, in the place of a model's adapters; all frozen.

    Of clients of different ranks each is padded with zeros to the largest, and keeps its scale.

    Args:
        model: with `MixedLoRALinear` layers, which are replaced.
        states: at least one; of adapters and mixers, without trained heads.

    Returns:
        What the layers ask for the clients of their rows, to be told of every batch.
    """
    rows = ClientRows(len(states))
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MixedLoRALinear):
            names.setdefault(module, []).append(name)
    for prefix, layer in list(mixed_layers(model)):
        stacked = _stack(layer, prefix, states)
        stacked.segments_of = rows
        for name in names[layer]:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, stacked)
    rows.hook = model.register_forward_pre_hook(rows.see, with_kwargs=True)
    return rows


@torch.no_grad()
def _stack(
    layer: MixedLoRALinear, prefix: str, states: Sequence[Mapping[str, Tensor]]
) -> GroupedMixedLoRALinear:
    rank = max(state[f"{prefix}.{INDIVIDUAL}.a"].shape[0] for state in states)
    mixer: bool | str | tuple[float, ...] | None = layer.fixed
    if layer.mixer is not None:
        mixer = True if layer.mixer.ndim == 2 else "scalar"
    stacked = GroupedMixedLoRALinear(
        layer.base,
        len(states),
        rank,
        layer.alpha,
        layer.dropout,
        rest_of_world=layer.rest_of_world is not None,
        mixer=mixer,
    )
    for name, tensor in stacked.named_parameters():
        if not name.startswith("base."):
            tensor.zero_()
            for own, state in zip(tensor, states, strict=True):
                _copy(own, state[f"{prefix}.{name}"], name)
    return stacked.requires_grad_(False).train(layer.training)


def _copy(into: Tensor, tensor: Tensor, name: str) -> None:
    if name == f"{INDIVIDUAL}.a":
        into[: len(tensor)] = tensor
    elif name == f"{INDIVIDUAL}.b":
        rank = tensor.shape[1]
        into[:, :rank] = tensor
        into *= into.shape[1] / rank  # its scale is alpha / rank, the layer's that of the largest
    else:
        into.copy_(tensor)

"""Many clients in one model, to be trained: their tensors, and what a layer sees of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedalt.model.grouped import ClientRows, stack_clients
from fedalt.model.states import is_part, mixed_layers
from fedalt_kernels import GroupedMixedLoRALinear, MixedLoRALinear, Segments


@contextmanager
def clients_in(
    model: nn.Module, states: Sequence[Mapping[str, Tensor]]
) -> Iterator[tuple[ClientRows, dict[str, GroupedMixedLoRALinear]]]:
    """`stack_clients` while it lasts, then the model has its own adapters again.

    Yields:
        Whom to tell whose a batch's rows are, and by name the layers that hold the clients.
    """
    names = [name for name, _ in mixed_layers(model)]
    places = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MixedLoRALinear)
    ]
    rows = None
    try:
        rows = stack_clients(model, states)
        yield rows, {n: cast("GroupedMixedLoRALinear", model.get_submodule(n)) for n in names}
    finally:
        if rows is not None and rows.hook is not None:
            rows.hook.remove()
        for name, layer in places:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)


@contextmanager
def stacked_clients(
    model: nn.Module,
    states: Sequence[Mapping[str, Tensor]],
    seeds: Sequence[int],
    recomputes: bool = False,
) -> Iterator[StackedClients]:
    """`clients_in`, to be trained.

    Args:
        model: with `MixedLoRALinear` layers.
        states: of adapters and mixers of one rank, without trained heads.
        seeds: by client, of the adapters' dropout.
        recomputes: layers are called once more in the backward, with the same masks.
    """
    with clients_in(model, states) as (rows, layers):
        yield StackedClients(layers, rows, seeds, recomputes)


class StackedClients:
    """The clients in a model's layers. Each layer sees of a client the rows that it has alone.

    Those that pad a client's rows to the length of others' are left out, so that they cost nothing,
    and the rows keep their numbers and with them the dropout's masks.

    Attributes:
        tensors: stacked [C, ...], by the names that they have in a client's state.
    """

    def __init__(
        self,
        layers: Mapping[str, GroupedMixedLoRALinear],
        rows: ClientRows,
        seeds: Sequence[int],
        recomputes: bool,
    ) -> None:
        self._rows, self._recomputes = rows, recomputes
        self.tensors = {
            f"{prefix}.{name}": tensor
            for prefix, layer in layers.items()
            for name, tensor in layer.named_parameters()
            if not name.startswith("base.")
        }
        device = next(iter(self.tensors.values())).device
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._drawn: dict[nn.Module, Tensor] = {}
        self._all, self._kept, self._segments = 0, torch.empty(0), Segments((), None, None)
        self._shape: torch.Size | None = None  # of the rows of a layer's call that is narrowed
        for layer in layers.values():
            layer.register_forward_pre_hook(self._narrow, with_kwargs=True)
            layer.register_forward_hook(self._widen)

    def train(self, parts: Sequence[str]) -> dict[str, nn.Parameter]:
        """Let the tensors of ``parts``, and no others, ask for a gradient; these."""
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(any(is_part(name, part) for part in parts))
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    @contextmanager
    def step(self, sizes: Mapping[int, tuple[int, int]]) -> Iterator[None]:
        """A step's forward and backward while it lasts.

        Args:
            sizes: by client, in the order of the batch, its examples and the tokens of its longest;
                shorter ones are padded on the left.
        """
        device = next(iter(self.tensors.values())).device
        longest, start, kept = max(tokens for _, tokens in sizes.values()), 0, []
        rows = [0] * len(self._generators)
        for number, (examples, tokens) in sizes.items():
            block = torch.arange(start, start + examples * longest).view(examples, longest)
            kept.append(block[:, longest - tokens :].flatten())
            start, rows[number] = start + block.numel(), examples * tokens
        self._kept, self._segments = torch.cat(kept).to(device), Segments(tuple(rows), None, None)
        self._all = start if start > len(self._kept) else 0
        self._drawn.clear()
        owners = [number for number, (examples, _) in sizes.items() for _ in range(examples)]
        with self._rows.of(owners):
            yield

    def _narrow(
        self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        (x,) = args
        told: dict[str, Any] = {"clients": self._rows(x)}
        if layer.training and layer.dropout:
            told["seeds"] = self._seeds(layer, x.device)
        self._shape = x.shape[:-1] if x.shape[:-1].numel() == self._all else None
        if self._shape is not None:
            x, told["clients"] = x.flatten(0, -2).index_select(0, self._kept), self._segments
        return (x,), told

    def _widen(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if self._shape is None:
            return y
        wide = y.new_zeros(self._all, y.shape[-1]).index_copy(0, self._kept, y)
        return wide.view(*self._shape, -1)

    def _seeds(self, layer: nn.Module, device: torch.device) -> Tensor:
        """Of each client, the seed that it would draw alone."""
        if layer in self._drawn:
            return self._drawn[layer]
        seeds = torch.stack(
            [
                torch.randint(2**63 - 1, (), generator=generator, device=device)
                for generator in self._generators
            ]
        )
        if self._recomputes:
            self._drawn[layer] = seeds
        return seeds

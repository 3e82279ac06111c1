"""Global and shared memory, barriers, and values in registers."""

from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .scheduler import Fault, here, pause


class Block(Tensor):
    """A value in registers."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(layout=None)


def block(values: Any) -> Block:
    return torch.as_tensor(values).as_subclass(Block)


class Global:
    """One tensor in global memory, and which of its elements copies do not see yet."""

    def __init__(self, tensor: Tensor) -> None:
        elements = tensor.untyped_storage().size() // tensor.element_size()
        self.start = tensor.storage_offset()
        self.flat = tensor.as_strided((elements,), (1,), 0)
        self.hidden = torch.zeros(elements, dtype=torch.bool)


class Pointer:
    def __init__(self, memory: Global, at: Any) -> None:
        self.memory, self.at = memory, at

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.at + offset)

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.memory.flat.dtype)


class Descriptor:
    """A row-major matrix of global memory, in blocks."""

    def __init__(self, memory: Global, sides: tuple[int, int], stride: int, box: tuple[int, int]):
        self.memory, self.block, self.layout = memory, box, None
        self.matrix = memory.flat.as_strided(sides, (stride, 1), memory.start)
        self.hidden = memory.hidden.as_strided(sides, (stride, 1), memory.start)

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype


class Shared:
    """Shared memory, and which of it copies and products do not see yet."""

    def __init__(self, data: Tensor, hidden: Tensor) -> None:
        self.data, self.hidden = data, hidden

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, i: Any) -> "Shared":
        return Shared(self.data[int(i)], self.hidden[int(i)])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(*order), self.hidden.permute(*order))

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        parts = (each.narrow(dim, start, length) for each in (self.data, self.hidden))
        return Shared(*parts)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "Shared":
        if prod(shape) > self.data.numel():
            raise Fault(f"{shape} is more than {self.shape}")
        return Shared(*(each.reshape(-1)[: prod(shape)].view(shape) for each in self.both()))

    def both(self) -> tuple[Tensor, Tensor]:
        return self.data, self.hidden

    def load(self, layout: Any) -> Block:
        pause()
        return block(self.data.clone())

    def store(self, value: Tensor) -> None:
        pause()
        self.data.copy_(value)
        self.hidden.fill_(True)
        here().unfenced.append((self.hidden, None))

    def seen(self) -> Tensor:
        """What a copy or a product reads here."""
        if self.hidden.any():
            raise Fault(f"{here().name} reads what it has stored without a fence")
        return self.data


class Barriers:
    def __init__(self, count: int) -> None:
        self.items = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> "Barrier":
        return self.items[int(i)]


class Barrier:
    def begin(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def arrive(self, count: int, promised: int = 0) -> None:
        self.missing -= count
        self.bytes += promised
        if self.missing < 0:
            raise Fault("a barrier got more arrivals than it counts")
        self._end()

    def land(self, size: int) -> None:
        self.bytes -= size
        if self.bytes < 0:
            raise Fault("more bytes landed than their barrier was promised")
        self._end()

    def _end(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count

    def has_passed(self, parity: int) -> bool:
        return self.phase % 2 != parity

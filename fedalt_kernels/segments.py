"""Which rows of a batch belong to which client: sorted segments, and how to sort and undo it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Rows by client: after sorting, client c has the ``sizes[c]`` rows behind those of c - 1.

    Sorting is stable, so a client's rows keep the order they have in x.
    """

    sizes: tuple[int, ...]  # C, of which some may be 0
    order: Tensor | None  # int64 [M], the rows as they are sorted; None: they lie so
    inverse: Tensor | None  # int64 [M], undoes it

    @classmethod
    def of(cls, clients: Tensor | Sequence[int], count: int) -> "Segments":
        """The segments of rows whose clients, from 0 to ``count`` - 1, are named one by one.

        Raises:
            TypeError: they are not whole numbers.
            ValueError: one is out of range.
        """
        numbers = clients.flatten().tolist() if isinstance(clients, Tensor) else list(clients)
        sizes = [0] * count
        for number in numbers:
            if not isinstance(number, int):
                raise TypeError(f"clients must be whole numbers, got {number!r}")
            if not 0 <= number < count:
                raise ValueError(f"clients must be 0 to {count - 1}, got {number}")
            sizes[number] += 1
        if numbers == sorted(numbers):
            return cls(tuple(sizes), None, None)
        order = torch.tensor(sorted(range(len(numbers)), key=numbers.__getitem__))
        return cls(tuple(sizes), order, order.argsort())

    def of_rows(self, rows: int, device: torch.device) -> "Segments":
        """The segments of M rows, of which each of these stands for as many, one after another.

        So a sequence's client is that of its tokens, and a prompt's that of its beams.

        Raises:
            ValueError: M is no multiple of the number of clients named.
        """
        named = sum(self.sizes)
        each, left = divmod(rows, named) if named else (1, rows)
        if left:
            raise ValueError(f"x has {rows} rows, no multiple of the {named} clients named")
        sizes = tuple(size * each for size in self.sizes)
        if self.order is None or self.inverse is None:
            return Segments(sizes, None, None)
        within = torch.arange(each, device=device)
        spread = [
            (index.to(device).unsqueeze(1) * each + within).flatten()
            for index in (self.order, self.inverse)
        ]
        return Segments(sizes, *spread)

    def sort(self, rows: Tensor) -> Tensor:
        """Rows [M, ...] of a batch, client after client."""
        return rows if self.order is None else rows.index_select(0, self.order)

    def restore(self, rows: Tensor) -> Tensor:
        """Sorted rows [M, ...] in the batch's own order."""
        return rows if self.inverse is None else rows.index_select(0, self.inverse)

    def owners(self, device: torch.device) -> Tensor:
        """Every row's client in the batch's order, int64 [M], without waiting for the device."""
        sizes = torch.tensor(self.sizes).to(device, non_blocking=True)
        clients = torch.arange(len(self.sizes), device=device)
        return self.restore(clients.repeat_interleave(sizes, output_size=sum(self.sizes)))

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Client and rows of every segment that has any."""
        start = 0
        for client, size in enumerate(self.sizes):
            if size:
                yield client, slice(start, start + size)
            start += size

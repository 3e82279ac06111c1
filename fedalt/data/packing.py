"""A batch whose short examples share rows, each blind to the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedalt.data.tokens import IGNORED, Batch, Example


def pack(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """The examples of one batch in as few rows as hold them, none longer than the longest of them.

    Positions begin at 0 with every example; without an attention mask transformers takes such a
    start for that of a text, which sees nothing before it. Rows are filled up at the right, where
    nothing that counts sees it.

    Returns:
        A batch without ``attention_mask``, whose labels are those of all positions.
    """
    rows = shelves([len(example.prompt) + len(example.answer) for example in examples])
    length = max(len(example.prompt) + len(example.answer) for example in examples)
    input_ids = torch.full((len(rows), length), pad_id)
    position_ids = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, places in enumerate(rows):
        start = 0
        for example in (examples[place] for place in places):
            ids = example.prompt + example.answer
            begin, end = start + len(example.prompt), start + len(ids)
            input_ids[row, start:end] = torch.tensor(ids)
            position_ids[row, start:end] = torch.arange(len(ids))
            labels[row, begin:end] = torch.tensor(example.labels())
            start = end
    return Batch(input_ids.to(device), None, position_ids.to(device), labels.to(device))


def shelves(lengths: Sequence[int]) -> list[list[int]]:
    """Places of ``lengths`` by row, the longest first, each in the first row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (row for row, free in enumerate(room) if free >= lengths[place])
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[row].append(place)
        room[row] -= lengths[place]
    return rows

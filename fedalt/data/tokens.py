"""Records as token ids, and batches of them as tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalt.config import DataConfig
from fedalt.data.records import Record

IGNORED = -100
"""The label of positions that do not count in the loss."""


@dataclass(frozen=True)
class Example:
    """One record in token ids; the prompt starts with BOS where the model has one, the answer
    ends with EOS. Of a ``cut`` one some are missing."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cut: bool = False


@dataclass(frozen=True)
class Batch:
    """Left-padded rows, so that every answer ends in the last column.

    Attributes:
        input_ids, attention_mask, position_ids: int64 [B, L].
        labels: int64 [B, T], the labels of the last T positions; T - 1 is the longest answer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """What the model's forward takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


def render_prompt(record: Record, config: DataConfig) -> str:
    """The text in front of the answer: the template with the record's fields put in."""
    template = config.prompt_with_input if record.input else config.prompt
    return re.sub(r"\{(instruction|input)\}", lambda m: getattr(record, m[1]), template)


def encode(records: Sequence[Record], tokenizer: Any, config: DataConfig) -> list[Example]:
    """Token ids of every record, at most ``max_length`` each.

    Of an over-long record the answer keeps its first half of that, and the prompt its last tokens,
    which hold the question and the answer's marker.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = [render_prompt(record, config) for record in records]
    answers = [record.output for record in records]
    examples = []
    for prompt, answer in zip(
        tokenizer(prompts, add_special_tokens=False)["input_ids"],
        tokenizer(answers, add_special_tokens=False)["input_ids"],
        strict=True,
    ):
        free = config.max_length - len(bos) - len(prompt)
        kept = answer[: max(free, config.max_length // 2) - 1]
        room = config.max_length - len(bos) - len(kept) - 1
        ids = (*kept, tokenizer.eos_token_id)
        cut = len(kept) < len(answer) or room < len(prompt)
        examples.append(Example(prompt=(*bos, *prompt[-room:]), answer=ids, cut=cut))
    return examples


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """One left-padded batch with labels on the answers."""
    rows = [example.prompt + example.answer for example in examples]
    length = max(map(len, rows))
    kept = max(len(example.answer) for example in examples) + 1
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full((len(rows), kept), IGNORED)
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        input_ids[i, length - len(row) :] = torch.tensor(row)
        attention_mask[i, length - len(row) :] = 1
        labels[i, kept - len(example.answer) :] = torch.tensor(example.answer)
    return Batch(
        input_ids.to(device),
        attention_mask.to(device),
        positions(attention_mask).to(device),
        labels.to(device),
    )


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids [B, L] of left-padded rows: the first real token is at 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)

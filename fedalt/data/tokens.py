"""Records as token ids, and batches of them as tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalt.config import CHAT, DataConfig
from fedalt.data.chats import Chat, as_chat
from fedalt.data.records import Record
from fedalt.data.turns import encode_chat

IGNORED = -100
"""The label of positions that do not count in the loss."""


@dataclass(frozen=True)
class Example:
    """One record in token ids; the prompt starts with BOS where the model has one, the answer
    ends with EOS. Of a ``cut`` one some are missing.

    Attributes:
        counted: of a chat, by token from the first answer on, whether it is the assistant's; empty:
            all are.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cut: bool = False
    counted: tuple[bool, ...] = ()

    @property
    def terms(self) -> int:
        """How many tokens count in the loss."""
        return sum(self.counted) if self.counted else len(self.answer)

    def labels(self) -> list[int]:
        """The answer, ``IGNORED`` where it does not count."""
        counted = self.counted or (True,) * len(self.answer)
        return [t if yes else IGNORED for t, yes in zip(self.answer, counted, strict=True)]


@dataclass(frozen=True)
class Batch:
    """Left-padded rows, so that every answer ends in the last column; or packed ones.

    Attributes:
        input_ids, attention_mask, position_ids: int64 [B, L]; without a mask, rows are packed.
        labels: int64 [B, T], the labels of the last T positions; T - 1 is the longest answer.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    labels: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """What the model's forward takes."""
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        mask = self.attention_mask
        return inputs if mask is None else {**inputs, "attention_mask": mask}


def render_prompt(record: Record, config: DataConfig) -> str:
    """The text in front of the answer: the template with the record's fields put in."""
    template = config.prompt_with_input if record.input else config.prompt
    return re.sub(r"\{(instruction|input)\}", lambda m: getattr(record, m[1]), template)


def encode(
    records: Sequence[Record | Chat], tokenizer: Any, config: DataConfig, tested: bool = False
) -> list[Example]:
    """Token ids of every record, at most ``max_length`` each.

    Of an over-long record the answer keeps its first half of that, and the prompt its last tokens,
    which hold the question and the answer's marker.

    Args:
        tested: whether the last turn of a chat is its answer; else all of the assistant's are.

    Raises:
        InputError: a chat that the base's template has no form for.
    """
    chats = config.prompt == CHAT
    plain = [r for r in records if isinstance(r, Record) and not chats]
    encoded = iter(_encode_plain(plain, tokenizer, config))
    examples = []
    for record in records:
        if isinstance(record, Record) and not chats:
            examples.append(next(encoded))
        else:
            chat = record if isinstance(record, Chat) else as_chat(record)
            examples.append(_fit_chat(chat, tokenizer, config.max_length, tested))
    return examples


def _encode_plain(records: Sequence[Record], tokenizer: Any, config: DataConfig) -> list[Example]:
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = [render_prompt(record, config) for record in records]
    answers = [record.output for record in records]
    if not records:
        return []
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


def _fit_chat(chat: Chat, tokenizer: Any, length: int, tested: bool) -> Example:
    turns = encode_chat(chat, tokenizer, last=tested)
    kept = max(length - len(turns.prompt), length // 2)
    answer, counted = turns.answer[:kept], turns.counted[:kept]
    room = length - len(answer)
    cut = len(answer) < len(turns.answer) or room < len(turns.prompt)
    return Example(turns.prompt[-room:], answer, cut, () if all(counted) else counted)


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
        labels[i, kept - len(example.answer) :] = torch.tensor(example.labels())
    return Batch(
        input_ids.to(device),
        attention_mask.to(device),
        positions(attention_mask).to(device),
        labels.to(device),
    )


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids [B, L] of left-padded rows: the first real token is at 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)

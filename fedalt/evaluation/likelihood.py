"""How likely a model holds each candidate answer of a multiple-choice question to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedalt.data import Chat, Example, Record, collate
from fedalt.model import sum_dtype
from fedalt.training import token_losses


def choice_scores(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    records: Sequence[Record | Chat],
    batch_size: int,
) -> dict[str, float]:
    """Accuracy, in percent, of the option that the model finds most likely after the prompt.

    ``choice`` compares the options' summed log-likelihoods, ``choice_norm`` these over the length
    in UTF-8 bytes: ``acc`` and ``acc_bytes`` of lm-evaluation-harness, whose ``acc_norm`` counts
    characters, which in ASCII are bytes. As there, the first option wins a tie, and an option's end
    is not counted; so where one option begins another, ``choice`` takes the shorter.

    Args:
        examples: the questions' prompts in token ids.
        records: the same questions; each has options, its output among them.
        batch_size: options, of any questions, that go through the model together.
    """
    right = {"choice": 0, "choice_norm": 0}
    all_nats = option_nats(model, tokenizer, examples, records, batch_size)
    for record, nats in zip(records, all_nats, strict=True):
        sizes = [len(option.encode()) or 1 for option in record.options]  # suites have empty ones
        per_byte = [cost / size for cost, size in zip(nats, sizes, strict=True)]
        for name, costs in (("choice", nats), ("choice_norm", per_byte)):
            right[name] += record.options[costs.index(min(costs))] == record.output
    return {name: 100 * count / len(records) for name, count in right.items()}


@torch.no_grad()
def option_nats(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    records: Sequence[Record | Chat],
    batch_size: int,
) -> list[list[float]]:
    """The negative log-likelihood, in nats, of every option of every question after its prompt.

    Options are encoded as answers are in training, without the EOS. Infinite for an option that
    the tokenizer makes nothing of.
    """
    options = [option for record in records for option in record.options]
    encoded = iter(tokenizer(options, add_special_tokens=False)["input_ids"])
    rows = [
        Example(example.prompt, tuple(next(encoded)))
        for example, record in zip(examples, records, strict=True)
        for _ in record.options
    ]
    device = next(model.parameters()).device
    nats = torch.full((len(rows),), math.inf, dtype=sum_dtype(device), device=device)
    longest_first = sorted(
        (place for place, row in enumerate(rows) if row.answer),
        key=lambda place: -len(rows[place].prompt + rows[place].answer),
    )
    for start in range(0, len(longest_first), batch_size):
        chosen = longest_first[start : start + batch_size]
        batch = collate([rows[place] for place in chosen], tokenizer.pad_token_id, device)
        nats[chosen] = token_losses(model, batch).to(nats.dtype).sum(1)
    return [part.tolist() for part in nats.split([len(record.options) for record in records])]

"""How likely a model holds each candidate answer of a multiple-choice question to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedalt.data import Chat, Example, Record, collate
from fedalt.model import ClientRows, sum_dtype, whose
from fedalt.training import token_losses


def choice_scores(
    records: Sequence[Record | Chat], all_nats: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Accuracy, in percent, of the option that the model finds most likely after the prompt.

    ``choice`` compares the options' summed log-likelihoods, ``choice_norm`` these over the length
    in UTF-8 bytes: ``acc`` and ``acc_bytes`` of lm-evaluation-harness, whose ``acc_norm`` counts
    characters, which in ASCII are bytes. As there, the first option wins a tie, and an option's end
    is not counted; so where one option begins another, ``choice`` takes the shorter.

    Args:
        records: questions; each has options, its output among them.
        all_nats: of every question's options, as from ``option_nats``.
    """
    right = {"choice": 0, "choice_norm": 0}
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
    clients: Sequence[int] = (),
    rows: ClientRows | None = None,
) -> list[list[float]]:
    """The negative log-likelihood, in nats, of every option of every question after its prompt.

    Options are encoded as answers are in training, without the EOS. Infinite for an option that
    the tokenizer makes nothing of.

    Args:
        examples: the questions' prompts in token ids.
        records: the same questions, with their options.
        batch_size: options, of any questions, that go through the model together.
        clients: by question, whose it is, where the model has many; ``rows``: whom to tell.
    """
    options = [option for record in records for option in record.options]
    encoded = iter(tokenizer(options, add_special_tokens=False)["input_ids"])
    tried = [
        Example(example.prompt, tuple(next(encoded)))
        for example, record in zip(examples, records, strict=True)
        for _ in record.options
    ]
    owners = [
        client
        for client, record in zip(clients or [0] * len(records), records, strict=True)
        for _ in record.options
    ]
    device = next(model.parameters()).device
    nats = torch.full((len(tried),), math.inf, dtype=sum_dtype(device), device=device)
    longest_first = sorted(
        (place for place, each in enumerate(tried) if each.answer),
        key=lambda place: -len(tried[place].prompt + tried[place].answer),
    )
    for start in range(0, len(longest_first), batch_size):
        chosen = longest_first[start : start + batch_size]
        batch = collate([tried[place] for place in chosen], tokenizer.pad_token_id, device)
        with whose(rows, [owners[place] for place in chosen]):
            nats[chosen] = token_losses(model, batch).to(nats.dtype).sum(1)
    return [part.tolist() for part in nats.split([len(record.options) for record in records])]

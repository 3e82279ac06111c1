"""How likely a model holds each candidate answer of a multiple-choice question to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedalt.data.records import Record
from fedalt.data.tokens import Example, collate
from fedalt.loss import token_losses


@torch.no_grad()
def choice_scores(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    records: Sequence[Record],
    batch_size: int,
) -> dict[str, float]:
    """Accuracy, in percent, of the option that the model finds most likely after the prompt.

    ``choice`` compares the options' summed log-likelihoods, ``choice_norm`` these over the length
    in UTF-8 bytes, as lm-evaluation-harness does under ``acc`` and ``acc_norm``. An option's end is
    not counted, since one option may begin another.

    Args:
        examples: the questions' prompts in token ids.
        records: the same questions; each has options, its output among them.
        batch_size: options, of any questions, that go through the model together.
    """
    rows, owners = [], []
    for place, (example, record) in enumerate(zip(examples, records, strict=True)):
        encoded = tokenizer(list(record.options), add_special_tokens=False)["input_ids"]
        for option, ids in zip(record.options, encoded, strict=True):
            rows.append(Example(example.prompt, tuple(ids)))
            owners.append((place, option))
    device = next(model.parameters()).device
    nats = torch.zeros(len(rows), dtype=torch.float64)
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt + rows[i].answer))
    for start in range(0, len(rows), batch_size):
        chosen = longest_first[start : start + batch_size]
        batch = collate([rows[i] for i in chosen], tokenizer.pad_token_id, device)
        nats[chosen] = token_losses(model, batch).double().sum(1).cpu()
    best: list[dict[str, tuple[float, str]]] = [{} for _ in records]
    for (place, option), cost in zip(owners, nats.tolist(), strict=True):
        for name, value in (("choice", -cost), ("choice_norm", -cost / len(option.encode()))):
            if name not in best[place] or value > best[place][name][0]:
                best[place][name] = (value, option)
    return {
        name: 100
        * sum(b[name][1] == r.output for b, r in zip(best, records, strict=True))
        / len(records)
        for name in ("choice", "choice_norm")
    }

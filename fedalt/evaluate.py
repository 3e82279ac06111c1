"""Scores of one client's model on test records: by generation and by loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fedalt.config import EvaluateConfig
from fedalt.data.tokens import Example, collate
from fedalt.loss import answer_loss


@dataclass(frozen=True)
class Scores:
    """Means over a client's test records.

    Attributes:
        rouge1: ROUGE-1 F-measure with stemming, in percent.
        exact_match: answers equal to the reference but for outer white space, in percent.
        loss: cross entropy of the reference answers, in nats a token.
    """

    rouge1: float
    exact_match: float
    loss: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def cells(self) -> list[str]:
        """The scores as they stand in a table, in the order above."""
        return [f"{self.rouge1:.1f}", f"{self.exact_match:.1f}", f"{self.loss:.3f}"]


@torch.no_grad()
def evaluate_client(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    references: Sequence[str],
    config: EvaluateConfig,
) -> Scores:
    """Score ``model``, which holds the client's adapters, on the client's test examples.

    Args:
        examples: prompts and answers in token ids.
        references: the answers as text, in the same order.
    """
    model.eval()
    device = next(model.parameters()).device
    answers = [""] * len(examples)
    total = torch.zeros((), dtype=torch.float64)
    longest_first = sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt))
    for start in range(0, len(examples), config.batch_size):
        rows = longest_first[start : start + config.batch_size]
        chunk = [examples[i] for i in rows]
        total += answer_loss(model, collate(chunk, tokenizer.pad_token_id, device), "sum").cpu()
        for i, text in zip(rows, generate(model, tokenizer, chunk, config), strict=True):
            answers[i] = text
    tokens = sum(len(example.answer) for example in examples)
    return score(answers, references, loss=total.item() / tokens)


def generate(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], config: EvaluateConfig
) -> list[str]:
    """Greedy or beam-search answers to the prompts, as text, in one left-padded batch."""
    device = next(model.parameters()).device
    prompts = [Example(prompt=example.prompt, answer=()) for example in examples]
    batch = collate(prompts, tokenizer.pad_token_id, device)
    tokens = model.generate(  # type: ignore[operator]
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = tokens[:, batch.input_ids.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def score(answers: Sequence[str], references: Sequence[str], loss: float) -> Scores:
    """ROUGE-1 and exact match of generated answers, beside a loss measured elsewhere."""
    from rouge_score.rouge_scorer import RougeScorer  # here, since it takes a second to import

    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    pairs = list(zip(answers, references, strict=True))
    rouge1 = sum(scorer.score(ref, answer)["rouge1"].fmeasure for answer, ref in pairs)
    exact = sum(answer == ref for answer, ref in pairs)
    return Scores(100 * rouge1 / len(pairs), 100 * exact / len(pairs), loss)

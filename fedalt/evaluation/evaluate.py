"""Scores of one client's model on test examples: by generation, by likelihood and by loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from fedalt.config import EvaluateConfig
from fedalt.data import Chat, Example, ImageExample, Record, collate, is_special
from fedalt.evaluation.answers import Answers
from fedalt.evaluation.likelihood import choice_scores, option_nats
from fedalt.evaluation.metrics import named_option, text_scores
from fedalt.model import ClientRows, GateMeter, sum_dtype, whose
from fedalt.training import token_losses


@dataclass(frozen=True)
class Examined:
    """A client's test records.

    Attributes:
        examples: prompts and answers in token ids, or images.
        records: what they were made of, in the same order.
        kept: takes the answers, and of texts the ROUGE-1 of each.
    """

    examples: Sequence[Any]
    records: Sequence[Any]
    kept: Answers | None = None


def evaluate_text(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    records: Sequence[Record | Chat],
    config: EvaluateConfig,
    meter: GateMeter | None = None,
    kept: Answers | None = None,
) -> dict[str, float]:
    """Score ``model``, which holds a client's adapters, on the client's test examples.

    Args:
        examples, records, kept: as in ``Examined``.
        meter: watches the loss's pass over the examples.

    Returns:
        ``rouge1``, ``rouge2``, ``rougeL``, ``exact_match`` in percent and ``loss`` in nats a token;
        where every record has options also ``accuracy`` (of the option that the generated answer
        names), ``choice`` and ``choice_norm`` (by likelihood), in percent.
    """
    (scores,) = evaluate_texts(model, tokenizer, [Examined(examples, records, kept)], config, meter)
    return scores


@torch.no_grad()
def evaluate_texts(
    model: nn.Module,
    tokenizer: Any,
    clients: Sequence[Examined],
    config: EvaluateConfig,
    meter: GateMeter | None = None,
    rows: ClientRows | None = None,
) -> list[dict[str, float]]:
    """What ``evaluate_text`` gives of each of a model's clients, whose records share batches.

    Args:
        rows: by which the model's layers learn whose a batch's rows are; None: it has one client.
    """
    model.eval()
    device = next(model.parameters()).device
    examples = [example for client in clients for example in client.examples]
    owners = [number for number, client in enumerate(clients) for _ in client.examples]
    answers = [""] * len(examples)
    nats = torch.zeros(len(examples), dtype=sum_dtype(device), device=device)
    # A client's lie side by side, so that layers need not sort rows, and its longest first.
    order = sorted(range(len(examples)), key=lambda i: (owners[i], -len(examples[i].prompt)))
    for start in range(0, len(examples), config.batch_size):
        places = order[start : start + config.batch_size]
        chunk = [examples[i] for i in places]
        with whose(rows, [owners[i] for i in places]):
            with meter or nullcontext():
                batch = collate(chunk, tokenizer.pad_token_id, device)
                nats[places] = token_losses(model, batch).to(nats.dtype).sum(1)
            for i, text in zip(places, generate(model, tokenizer, chunk, config), strict=True):
                answers[i] = text
    sizes = [len(client.examples) for client in clients]
    ends = list(accumulate(sizes))
    scored = [
        _scores(client, answers[end - size : end], part.sum().item())
        for client, size, end, part in zip(clients, sizes, ends, nats.split(sizes), strict=True)
    ]
    asked = [
        number for number, c in enumerate(clients) if all(record.options for record in c.records)
    ]
    if asked:
        likely = option_nats(
            model,
            tokenizer,
            [example for number in asked for example in clients[number].examples],
            [record for number in asked for record in clients[number].records],
            config.batch_size,
            [number for number in asked for _ in clients[number].examples],
            rows,
        )
        for number in asked:
            records = clients[number].records
            scored[number] |= choice_scores(records, likely[: len(records)])
            del likely[: len(records)]
    return scored


def _scores(client: Examined, answers: Sequence[str], nats: float) -> dict[str, float]:
    """Of a client's answers; ``nats`` is the loss summed over its tokens."""
    records, each = client.records, list[float]()
    scores = text_scores(answers, [record.output for record in records], each)
    if client.kept is not None:
        client.kept.take(answers, each)
    scores["loss"] = nats / sum(example.terms for example in client.examples)
    if all(record.options for record in records):
        right = sum(
            named_option(answer, record.options) == record.output
            for answer, record in zip(answers, records, strict=True)
        )
        scores["accuracy"] = 100 * right / len(records)
    return scores


def generate(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], config: EvaluateConfig
) -> list[str]:
    """Greedy or beam-search answers to the prompts, as text, in one left-padded batch.

    An answer ends with the tokenizer's end token, or with a special one that ends an example's.
    """
    ends = {tokenizer.eos_token_id, *(each.answer[-1] for each in examples if each.answer)}
    device = next(model.parameters()).device
    prompts = [Example(prompt=example.prompt, answer=()) for example in examples]
    batch = collate(prompts, tokenizer.pad_token_id, device)
    tokens = model.generate(  # type: ignore[operator]
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        do_sample=False,
        eos_token_id=sorted(each for each in ends if is_special(tokenizer, each)),
        pad_token_id=tokenizer.pad_token_id,
    )
    new = tokens[:, batch.input_ids.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


@torch.no_grad()
def evaluate_images(
    model: nn.Module,
    pixels: Callable[[Sequence[ImageExample]], Tensor],
    examples: Sequence[ImageExample],
    batch_size: int,
    meter: GateMeter | None = None,
    found: list[int] | None = None,
) -> dict[str, float]:
    """``accuracy`` in percent and ``loss`` in nats of an image classifier.

    Args:
        pixels: of a batch of examples, float32 [B, C, H, W].
        meter: watches the pass over the examples.
        found: takes the class that the model finds in every image.
    """
    model.eval()
    weight = next(model.parameters())
    total = torch.zeros(2, dtype=sum_dtype(weight.device), device=weight.device)
    with meter or nullcontext():
        for start in range(0, len(examples), batch_size):
            chunk = examples[start : start + batch_size]
            logits = model(pixel_values=pixels(chunk).to(weight.device, weight.dtype)).logits
            labels = torch.tensor([example.label for example in chunk], device=logits.device)
            loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            best = logits.argmax(-1)
            total += torch.stack([(best == labels).sum(), loss]).to(total.dtype)
            if found is not None:
                found += best.tolist()
    right, loss = (total / len(examples)).tolist()
    return {"accuracy": 100 * right, "loss": loss}

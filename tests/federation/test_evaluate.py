"""Scores, generation and loss."""

import pytest
import torch

from fedalt.config import DataConfig, EvaluateConfig, ModelConfig
from fedalt.data import Record
from fedalt.data.tokens import collate, encode
from fedalt.evaluate import evaluate_client, generate, score
from fedalt.loss import answer_loss
from fedalt.models import load_base

RECORDS = [Record("say " + "x" * n, "y" * (1 + n % 3)) for n in (1, 9, 4, 17, 2)]


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(ModelConfig(path=str(tiny_base)))


@pytest.fixture
def examples(base):
    return encode(RECORDS, base[1], DataConfig())


def test_rouge_stems_and_exact_match_does_not():
    scores = score(["the dogs run", "a cat"], ["the dog runs", "a cat"], loss=0.5)
    assert scores.rouge1 == pytest.approx(100)
    assert scores.exact_match == 50
    # precision 1/2, recall 1/1
    assert score(["a b"], ["a"], loss=0.0).rouge1 == pytest.approx(100 * 2 / 3)
    assert score(["z"], ["a"], loss=0.0).rouge1 == 0


def test_batched_answers_are_those_of_one_at_a_time(base, examples):
    model, tokenizer = base
    config = EvaluateConfig(max_new_tokens=6)
    together = generate(model, tokenizer, examples, config)
    alone = [generate(model, tokenizer, [example], config)[0] for example in examples]
    assert together == alone
    assert len(set(together)) > 1


def test_loss_counts_answers_alone_and_padding_never(base, examples):
    model, tokenizer = base
    batch = collate(examples, tokenizer.pad_token_id, torch.device("cpu"))
    together = answer_loss(model, batch, "sum").item()
    by_hand = 0.0
    for example in examples:
        ids = torch.tensor([example.prompt + example.answer])
        log_p = model(ids).logits[0].double().log_softmax(-1)
        for position, token in enumerate(example.answer, start=len(example.prompt)):
            by_hand -= log_p[position - 1, token].item()
    assert together == pytest.approx(by_hand, rel=1e-5)


def test_a_model_without_logits_to_keep_gives_the_same_loss(base, examples):
    model, tokenizer = base
    batch = collate(examples, tokenizer.pad_token_id, torch.device("cpu"))

    class Plain(torch.nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            return model(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    assert answer_loss(Plain(), batch).item() == pytest.approx(
        answer_loss(model, batch).item(), rel=1e-5
    )


def test_evaluation_does_not_depend_on_the_batch(base, examples):
    model, tokenizer = base
    references = [record.output for record in RECORDS]
    one, many = (
        evaluate_client(
            model, tokenizer, examples, references, EvaluateConfig(batch_size=b, max_new_tokens=4)
        )
        for b in (1, 4)
    )
    assert one.loss == pytest.approx(many.loss, rel=1e-5)
    assert (one.rouge1, one.exact_match) == (many.rouge1, many.exact_match)


def test_beams_are_used(base, examples):
    model, tokenizer = base
    beams = generate(model, tokenizer, examples, EvaluateConfig(max_new_tokens=8, num_beams=3))
    assert len(beams) == len(examples)

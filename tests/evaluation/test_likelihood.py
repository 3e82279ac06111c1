"""Options by likelihood: the sums, how they are compared, and what goes into the model."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fedalt
from fedalt.config.schema import DataConfig, ModelConfig
from fedalt.data import Record
from fedalt.data.tokens import encode
from fedalt.evaluation import likelihood
from fedalt.evaluation.likelihood import choice_scores, option_nats
from fedalt.model.base import load_base
from tests.kernels.budget import UNIT32, excess

QUESTIONS = [
    Record("of what?", "yes", options=("yes", "yes sir", "no")),  # one begins another
    Record("a much longer question, so that the others are padded", "日本", options=("né", "日本")),
    Record("q", "b", options=("a", "b", "b", "a rather long option, of 31 bytes")),
]


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(ModelConfig(path=str(tiny_base)))


def alone(model, tokenizer, record):
    """Nats of every option in fp64, each in a row of its own, from all logits."""
    prompt = encode([record], tokenizer, DataConfig())[0].prompt
    nats = []
    for option in record.options:
        ids = [*prompt, *tokenizer(option, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats.append(-sum(log_p[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
    return nats


def together(model, tokenizer, batch_size):
    examples = encode(QUESTIONS, tokenizer, DataConfig())
    nats = option_nats(model, tokenizer, examples, QUESTIONS, batch_size)
    assert [len(part) for part in nats] == [3, 2, 4]
    return nats


def flat(nats, dtype=torch.float64):
    return torch.tensor([cost for part in nats for cost in part], dtype=dtype)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_nats_are_those_of_each_option_alone(base, batch_size):
    """Of a model in fp64 to what the loss's fp32 may lose, and in fp32 within the error budget.

    The loss rounds the V logits, of at most s, once (u s) and subtracts three numbers of at most 2s
    (6 u s); the sum of V exponentials has a relative error of V u at most, and so has its log an
    absolute one. Those of an option's tokens add up in fp64.
    """
    model, tokenizer = base
    double = copy.deepcopy(model).double()
    truth = flat(alone(double, tokenizer, record) for record in QUESTIONS)
    ids = torch.tensor([encode(QUESTIONS, tokenizer, DataConfig())[1].prompt])
    scale = 2 * double(ids).logits.abs().max().item()
    per_token = UNIT32 * (8 * scale + len(tokenizer))
    lengths = flat([[len(o.encode()) for o in record.options] for record in QUESTIONS])
    got = flat(together(double, tokenizer, batch_size))
    assert (got - truth).abs().le(per_token * lengths).all()
    assert per_token < 1e-4
    assert truth.min() > 1

    eager = flat((alone(model, tokenizer, record) for record in QUESTIONS), torch.float32)
    single = flat(together(model, tokenizer, batch_size), torch.float32)
    over = excess(single, eager, truth, length=len(tokenizer))
    assert max(over.values()) <= 1


def test_scores_do_not_depend_on_the_batch(base):
    model, tokenizer = base
    examples = encode(QUESTIONS, tokenizer, DataConfig())
    one, many = (
        choice_scores(QUESTIONS, option_nats(model, tokenizer, examples, QUESTIONS, size))
        for size in (1, 64)
    )
    assert one == many
    nats = [alone(model, tokenizer, record) for record in QUESTIONS]
    right = norm = 0
    for record, costs in zip(QUESTIONS, nats, strict=True):
        best = min(range(len(costs)), key=costs.__getitem__)
        per_byte = [c / len(o.encode()) for c, o in zip(costs, record.options, strict=True)]
        right += record.options[best] == record.output
        norm += record.options[min(range(len(costs)), key=per_byte.__getitem__)] == record.output
    assert many == {"choice": 100 * right / 3, "choice_norm": 100 * norm / 3}


def test_options_are_encoded_as_answers_in_training(monkeypatch):
    """With a tokenizer that merges letters; of the answer only EOS is missing."""
    folder = Path(fedalt.__file__).parent / "assets" / "base"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    seen = set()

    def collate(examples, *rest):
        seen.update(examples)
        return real_collate(examples, *rest)

    real_collate = likelihood.collate
    monkeypatch.setattr(likelihood, "collate", collate)
    model = Unigram(dict.fromkeys(range(len(tokenizer)), 0.5 / len(tokenizer)), len(tokenizer))
    records = [Record("Is it so", "the answer", options=("the answer", "then", " é", "the"))]
    option_nats(model, tokenizer, encode(records, tokenizer, DataConfig()), records, 2)
    trained = encode(
        [Record("Is it so", option) for option in records[0].options], tokenizer, DataConfig()
    )
    assert all(example.answer[-1] == tokenizer.eos_token_id for example in trained)
    assert seen == {type(e)(e.prompt, e.answer[:-1]) for e in trained}
    assert any(len(e.answer) - 1 < len(o) for e, o in zip(trained, records[0].options, strict=True))


class Unigram(nn.Module):
    """Gives every token the same probability wherever it stands."""

    def __init__(self, probabilities, size):
        super().__init__()
        logits = torch.full((size,), -torch.inf)
        for token, probability in probabilities.items():
            logits[token] = math.log(probability)
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep):
        logits = self.logits.expand(*input_ids.shape, -1)[:, -logits_to_keep:]
        return SimpleNamespace(logits=logits)


def scores_of(tokenizer, probabilities, output, options):
    """Of one question, by a model that gives the bytes these probabilities, in percent."""
    table = {}
    for text, probability in probabilities.items():
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            table[token] = probability
    table[0] = 1 - sum(table.values())
    assert table[0] > 0
    records = [Record("q", output, options=options)]
    examples = encode(records, tokenizer, DataConfig())
    nats = option_nats(Unigram(table, len(tokenizer)), tokenizer, examples, records, 8)
    scores = choice_scores(records, nats)
    return scores["choice"], scores["choice_norm"]


@pytest.mark.parametrize(
    ("probabilities", "options", "choice", "choice_norm"),
    [
        # ab: -2 ln 0.25 = 2.77 nats, 1.39 a byte; zzzz: -4 ln 0.4 = 3.67 nats, 0.92 a byte
        ({"ab": 0.25, "z": 0.4}, ("zzzz", "ab"), "ab", "zzzz"),
        # abzz begins with ab, which is never less likely: 2.77 + 1.83 nats, 1.15 a byte
        ({"ab": 0.25, "z": 0.4}, ("abzz", "ab"), "ab", "abzz"),
        ({"a": 0.4, "z": 0.2}, ("a", "az"), "a", "a"),
        # éé is 4 bytes in 2 characters: 1.61 nats a byte but 3.22 a character, b is 1.90
        ({"é": 0.2, "b": 0.15}, ("bbb", "éé"), "bbb", "éé"),
        # the first wins a tie
        ({"ab": 0.2}, ("a", "b"), "a", "a"),
        ({"ab": 0.2}, ("b", "a", "a"), "b", "b"),
        ({"ab": 0.2}, ("aa", "b"), "b", "aa"),
        # what the tokenizer makes nothing of is never taken
        ({"ab": 0.2}, ("", "b"), "b", "b"),
        # c is impossible
        ({"ab": 0.2}, ("c", "b"), "b", "b"),
    ],
)
def test_how_options_are_compared(base, probabilities, options, choice, choice_norm):
    for output in options:
        got = scores_of(base[1], probabilities, output, options)
        assert got == (100 * (output == choice), 100 * (output == choice_norm))


def test_two_options_of_one_text_are_one_answer(base):
    assert scores_of(base[1], {"ab": 0.2}, "b", ("aa", "b", "b")) == (100, 0)
    assert scores_of(base[1], {"ab": 0.2}, "b", ("b", "b")) == (100, 100)


def test_an_option_without_tokens_costs_infinitely_much(base):
    model, tokenizer = base
    records = [Record("q", "b", options=("", "b"))]
    examples = encode(records, tokenizer, DataConfig())
    nats = option_nats(model, tokenizer, examples, records, 8)
    assert nats[0][0] == math.inf
    assert nats[0][1] == pytest.approx(alone(model, tokenizer, records[0])[1], rel=1e-5)

"""A client's scores: generation and loss of texts, classes of images, and the losses themselves."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from fedalt.config.schema import DataConfig, EvaluateConfig, ModelConfig
from fedalt.data import Record
from fedalt.data.images import ImageExample
from fedalt.data.tokens import IGNORED, Batch, Example, collate, encode
from fedalt.evaluation import evaluate
from fedalt.evaluation.evaluate import evaluate_images, evaluate_text, generate
from fedalt.evaluation.metrics import text_scores
from fedalt.model.base import inject, load_base
from fedalt.model.gates import GateMeter
from fedalt.training.loss import answer_loss, class_loss
from tests.kernels.budget import UNIT32, excess

RECORDS = [Record("say " + "x" * n, "y" * (1 + n % 3)) for n in (1, 9, 4, 17, 2)]
QUESTIONS = [
    Record("which", "yes", options=("no", "yes")),
    Record("which of the two", "no", options=("no", "yes")),
    Record("what", "a", options=("a", "ab", "b")),
]


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(ModelConfig(path=str(tiny_base)))


@pytest.fixture
def examples(base):
    return encode(RECORDS, base[1], DataConfig())


def nats_alone(model, examples):
    """Nats of every answer in fp64, each in a row of its own, from all logits."""
    nats = []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.prompt + example.answer])).logits[0]
        log_p = logits.double().log_softmax(-1)
        places = enumerate(example.answer, start=len(example.prompt))
        nats.append(-sum(log_p[place - 1, token].item() for place, token in places))
    return torch.tensor(nats, dtype=torch.float64)


def in_fp64(base):
    return load_base(ModelConfig(path=base[0].name_or_path))[0].double()


def test_batched_answers_are_those_of_one_at_a_time(base, examples):
    model, tokenizer = base
    config = EvaluateConfig(max_new_tokens=6)
    together = generate(model, tokenizer, examples, config)
    alone = [generate(model, tokenizer, [example], config)[0] for example in examples]
    assert together == alone
    assert len(set(together)) > 1


def test_beams_are_used(base, examples):
    """Four beams find answers that are likelier than those of greedy search."""
    model, tokenizer = base
    said = []

    def keep(tokens, skip_special_tokens):
        said.append(
            [Example(e.prompt, tuple(t.tolist())) for e, t in zip(examples, tokens, strict=True)]
        )
        return [""] * len(tokens)

    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    for beams in (1, 4):
        config = EvaluateConfig(max_new_tokens=3, num_beams=beams)
        generate(model, SimpleNamespace(batch_decode=keep, **ids), examples, config)
    greedy, beam = (nats_alone(model, answers) for answers in said)
    assert (beam <= greedy + 1e-4).all()
    assert (beam < greedy - 0.1).any()


@pytest.mark.parametrize("batch_size", [1, 2, 128])
def test_scores_of_texts(base, examples, batch_size):
    """In the records' order, whatever the batches; the loss is nats a token, EOS among them."""
    model, tokenizer = base
    config = EvaluateConfig(batch_size=batch_size, max_new_tokens=6)
    scores = evaluate_text(model, tokenizer, examples, RECORDS, config)
    assert list(scores) == ["rouge1", "rouge2", "rougeL", "exact_match", "loss"]
    tokens = sum(len(record.output) + 1 for record in RECORDS)
    eager, truth = (nats_alone(m, examples).sum() / tokens for m in (model, in_fp64(base)))
    over = excess(torch.tensor(scores["loss"]), eager.float(), truth, len(tokenizer))
    assert max(over.values()) <= 1


def test_answers_stand_beside_their_own_references(base, examples, monkeypatch):
    """Longest prompts go first; here each answer is its own reference but for one."""
    model, tokenizer = base
    said = {e.prompt: r.output for e, r in zip(examples, RECORDS, strict=True)}
    said[examples[2].prompt] = "z"
    batches = []

    def answers(model, tokenizer, chunk, config):
        batches.append([len(example.prompt) for example in chunk])
        return [said[example.prompt] for example in chunk]

    monkeypatch.setattr(evaluate, "generate", answers)
    config = EvaluateConfig(batch_size=2)
    scores = evaluate_text(model, tokenizer, examples, RECORDS, config)
    assert scores["exact_match"] == 80
    lengths = [length for batch in batches for length in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    outputs = [record.output for record in RECORDS]
    wanted = text_scores([*outputs[:2], "z", *outputs[3:]], outputs)
    assert {name: scores[name] for name in wanted} == wanted


def test_scores_of_questions(base, monkeypatch):
    """Where all have options; the first answer names both, the last but begins as the right one."""
    model, tokenizer = base
    examples = encode(QUESTIONS, tokenizer, DataConfig())
    said = dict(zip([e.prompt for e in examples], ["Yes, not no", "no", "ab"], strict=True))
    monkeypatch.setattr(evaluate, "generate", lambda *a: [said[e.prompt] for e in a[2]])
    scores = evaluate_text(model, tokenizer, examples, QUESTIONS, EvaluateConfig())
    assert list(scores)[4:] == ["loss", "accuracy", "choice", "choice_norm"]
    assert scores["accuracy"] == pytest.approx(100 * 2 / 3)
    assert scores["exact_match"] == pytest.approx(100 / 3)
    nats = evaluate.option_nats(model, tokenizer, examples, QUESTIONS, 1)
    wanted = evaluate.choice_scores(QUESTIONS, nats)
    assert {name: scores[name] for name in wanted} == wanted
    mixed = [*QUESTIONS[:2], Record("what", "a")]
    scores = evaluate_text(model, tokenizer, examples, mixed, EvaluateConfig())
    assert list(scores)[4:] == ["loss"]


class Watch:
    """A meter that only knows whether it is entered."""

    entered = times = 0

    def __enter__(self):
        self.entered += 1
        self.times += 1

    def __exit__(self, *error):
        self.entered -= 1


def test_the_meter_watches_the_loss_alone(base):
    """Neither generation nor the likelihoods of options, whose tokens are not the client's."""
    model, tokenizer = base
    examples = encode(QUESTIONS, tokenizer, DataConfig())
    watch, calls = Watch(), []

    def see(module, args, kwargs):
        calls.append((watch.entered, tuple(kwargs["input_ids"].shape)))

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    config = EvaluateConfig(batch_size=2, max_new_tokens=3)
    evaluate_text(model, tokenizer, examples, QUESTIONS, config, watch)
    handle.remove()
    lengths = sorted((len(e.prompt + e.answer) for e in examples), reverse=True)
    assert watch.times == 2
    assert [shape for entered, shape in calls if entered] == [(2, lengths[0]), (1, lengths[2])]
    assert len(calls) > 2 + 2 + 4  # generation takes a pass or more a batch, 7 options take four


def test_gates_of_an_evaluation_are_those_of_the_answers_and_prompts(base, examples):
    model = inject(in_fp64(base), 2, 4, 0.0, "all-linear")
    tokenizer = base[1]
    evaluated, direct = GateMeter(model), GateMeter(model)
    config = EvaluateConfig(batch_size=2, max_new_tokens=2)
    evaluate_text(model, tokenizer, examples, RECORDS, config, evaluated)
    for example in examples:
        ids = torch.tensor([example.prompt + example.answer])
        with torch.no_grad(), direct:
            model(input_ids=ids)
    assert len(direct.means()) == 14
    assert evaluated.means() == pytest.approx(direct.means(), abs=1e-12)  # fp64, 10³ operations


def test_evaluation_switches_dropout_off(base, examples):
    model = inject(in_fp64(base), 2, 4, 0.5, "all-linear").train()
    for layer in model.modules():
        if isinstance(getattr(layer, "individual", None), nn.Module):
            nn.init.ones_(layer.individual.b)
    config = EvaluateConfig(max_new_tokens=1)
    one, two = (
        evaluate_text(model.train(), base[1], examples, RECORDS, config)["loss"] for _ in range(2)
    )
    assert one == two
    assert not any(module.training for module in model.modules())


def test_a_model_without_logits_to_keep_gives_the_same_loss(base, examples):
    model, tokenizer = base
    batch = collate(examples, tokenizer.pad_token_id, torch.device("cpu"))

    class Plain(nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            return model(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    with torch.no_grad():
        got = answer_loss(Plain(), batch)
        eager = answer_loss(model, batch)
        truth = answer_loss(in_fp64(base), batch).double()
    assert max(excess(got, eager, truth, len(tokenizer)).values()) <= 1


class Given(nn.Module):
    """A model whose logits are its parameters."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep):
        return SimpleNamespace(logits=self.logits[:, -logits_to_keep:])


def test_the_mean_loss_and_its_gradient_are_torchs():
    """Both round one softmax a token; beyond it the mean sums n tokens and divides once."""
    rows = [Example((1, 2, 3), (4, 5)), Example((1,), (6, 7, 8, 9)), Example((1, 2), (3,))]
    batch = collate(rows, 0, torch.device("cpu"))
    length, kept = batch.input_ids.shape[1], batch.labels.shape[1]
    assert (length, kept) == (5, 5)
    torch.manual_seed(0)
    logits = 3 * torch.randn(3, length, 12)
    ours, torchs = Given(logits.clone()), nn.Parameter(logits.clone())
    loss = answer_loss(ours, batch)
    labels = torch.full((3, length), IGNORED)
    for i, row in enumerate(rows):
        labels[i, -len(row.answer) :] = torch.tensor(row.answer)
    wanted = nn.functional.cross_entropy(torchs[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    tokens = 7
    assert (loss - wanted).abs() <= 2 * tokens * UNIT32 * wanted
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(ours.logits.grad, torchs.grad, rtol=4 * UNIT32, atol=0)
    assert (ours.logits.grad.abs().sum(-1) > 0).sum() == tokens
    total = answer_loss(ours, batch, "sum")
    assert total.item() == pytest.approx(tokens * wanted.item(), rel=2 * tokens * UNIT32)


def test_the_loss_by_hand():
    """Of p = 1/4 and 1/8 in the first row and 1/4 in the second: 7 ln 2 over three tokens."""
    p = torch.tensor([[[0.25] * 4, [0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125]]] * 2)
    batch = Batch(
        torch.zeros(2, 3).long(),
        torch.ones(2, 3).long(),
        torch.arange(3).expand(2, -1),
        torch.tensor([[IGNORED, 3, 2], [IGNORED, IGNORED, 1]]),  # by the position before each
    )
    model = Given(p.log())
    assert answer_loss(model, batch, "sum").item() == pytest.approx(7 * math.log(2), rel=1e-6)
    assert answer_loss(model, batch).item() == pytest.approx(7 * math.log(2) / 3, rel=1e-6)


class Table(nn.Module):
    """Looks an image's logits up by its first pixel."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.logits[pixel_values[:, 0, 0, 0].long()])


def first_pixels(chunk):
    return torch.stack([torch.full((1, 2, 2), float(example.record)) for example in chunk])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_of_images_by_hand(batch_size):
    """Right, right, wrong: -ln of 1/2, 1/2 and 1/8 is 5 ln 2."""
    model = Table([[0.5, 0.25, 0.25], [0.375, 0.5, 0.125], [0.75, 0.125, 0.125]]).train()
    examples = [ImageExample(row, label) for row, label in ((0, 0), (1, 1), (2, 2))]
    watch = Watch()
    scores = evaluate_images(model, first_pixels, examples, batch_size, watch)
    assert list(scores) == ["accuracy", "loss"]
    wanted = {"accuracy": 200 / 3, "loss": 5 * math.log(2) / 3}
    assert scores == pytest.approx(wanted, rel=1e-6)
    assert watch.times == 1
    assert not model.training


def test_scores_of_a_vision_transformer():
    """Those of one image at a time in fp64, within the error budget of fp32."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=4,
        patch_size=2,
        num_labels=3,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    images = torch.randn(7, 3, 4, 4)
    examples = [ImageExample(i, i % 3) for i in range(7)]
    rows = {}
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        with torch.no_grad():
            logits = [model(pixel_values=image[None].to(dtype)).logits[0] for image in images]
        log_p = [logit.double().log_softmax(-1) for logit in logits]
        rows[dtype] = torch.stack([-row[i % 3] for i, row in enumerate(log_p)])
    right = sum(row.argmax().item() == i % 3 for i, row in enumerate(logits))
    assert 0 < right < 7

    def pixels(chunk):
        return images[[example.record for example in chunk]]

    scores = evaluate_images(model, pixels, examples, 3)
    assert scores["accuracy"] == pytest.approx(100 * right / 7, rel=1e-12)
    truth, eager = rows[torch.float64].mean(), rows[torch.float32].mean()
    loss = class_loss(model, images, [example.label for example in examples]).detach()
    for got in (torch.tensor(scores["loss"]), loss):
        assert max(excess(got, eager.float(), truth, length=48).values()) <= 1

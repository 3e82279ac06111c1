"""Gradients of single records from one pass: those that each record has alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from fedalt.config import PrivacyConfig
from fedalt.model import keeps_rows_apart
from fedalt.model.states import client_tensors, set_trainable
from fedalt.run.stage import set_stage
from fedalt.training import train_client
from fedalt.training.activations import recomputing
from fedalt.training.private import PrivateSteps
from fedalt.training.records import record_gradients
from fedalt_kernels import MixedLoRALinear

WIDTH, TOKENS = 8, 11
KINDS = {
    "mixed": {},
    "one gate a layer": {"mixer": "scalar"},
    "halves": {"mixer": (0.5, 0.5)},
    "sum": {"mixer": None},
    "plain LoRA": {"rest_of_world": False},
}
RECORDS = [([1, 4, 2], [5, 9]), ([3], [8]), ([7, 2, 6, 10], [1, 2, 3, 4]), ([5, 5], [6])]


class Reader(nn.Module):
    """Embeddings, one attention and an output over left-padded texts, all of it in fp64."""

    def __init__(self, **kind):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(TOKENS, WIDTH).requires_grad_(False)
        self.q, self.v, self.out = (
            MixedLoRALinear(nn.Linear(WIDTH, n), rank=2, alpha=4, dropout=0.0, **kind)
            for n in (WIDTH, WIDTH, TOKENS)
        )
        self.double()
        with torch.no_grad():
            for _, tensor in client_tensors(self):
                tensor.add_(torch.randn_like(tensor), alpha=0.3)

    def forward(self, ids, real):
        h = self.embed(ids)
        seen = real[:, None, :] & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        seen = seen | torch.eye(ids.shape[1]).bool()  # padding sees itself
        return self.out(h + scaled_dot_product_attention(self.q(h), h, self.v(h), seen))


def reading_loss(model, batch):
    """The mean over all answers' tokens."""
    longest = max(len(prompt) + len(answer) for prompt, answer in batch)
    pads = [longest - len(prompt) - len(answer) for prompt, answer in batch]
    ids = torch.tensor(
        [[0] * pad + prompt + answer for pad, (prompt, answer) in zip(pads, batch, strict=True)]
    )
    real = torch.arange(longest) >= torch.tensor(pads)[:, None]
    logits = model(ids, real)
    told = [logits[i, -len(answer) - 1 : -1] for i, (_, answer) in enumerate(batch)]
    answers = [token for _, answer in batch for token in answer]
    return cross_entropy(torch.cat(told), torch.tensor(answers))


def terms(batch):
    return sum(len(answer) for _, answer in batch)


def trained_of(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def alone(model, loss, batch):
    """By record, its own gradient by autograd's own function."""
    trained = trained_of(model)
    found = []
    for record in batch:
        grads = torch.autograd.grad(loss(model, [record]), list(trained.values()))
        found.append(dict(zip(trained, grads, strict=True)))
    return found


def together(model, loss, count, batch):
    gradients = record_gradients(model, trained_of(model), batch, loss, count)[1]
    model.zero_grad(set_to_none=True)
    return gradients


def furthest(got, expected):
    """The largest difference, relative to its tensor's largest number."""
    assert got.keys() == expected[0].keys()
    assert all(len(gradients) == len(expected) for gradients in got.values())
    return max(
        float((mine - own[name]).abs().max() / own[name].abs().max())
        for name, gradients in got.items()
        for mine, own in zip(gradients, expected, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_in_fp64_they_are_those_of_single_records(kind):
    """Chains of fewer than 2^8 roundings of 2^-53, numbers of about one size."""
    model = Reader(**KINDS[kind])
    expected = alone(model, reading_loss, RECORDS)
    assert furthest(together(model, reading_loss, terms, RECORDS), expected) <= 2.0**-45


def test_a_parameters_own_gradient_is_that_of_the_mean_and_the_model_is_as_before():
    model = Reader()
    model.zero_grad()
    reading_loss(model, RECORDS).backward()
    expected = {name: p.grad.clone() for name, p in trained_of(model).items()}
    model.zero_grad()
    mean, _ = record_gradients(model, trained_of(model), RECORDS, reading_loss, terms)
    for name, p in trained_of(model).items():
        assert (p.grad - expected[name]).abs().max() <= 2.0**-45 * expected[name].abs().max()
    again = reading_loss(model, RECORDS).detach()
    assert abs(float(mean - again)) <= 2.0**-45 * float(again)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_record_that_is_not_finite_spoils_no_other():
    """Or else the others of its batch would tell that it is there."""
    model = Reader()
    expected = alone(model, reading_loss, RECORDS)
    with torch.no_grad():
        model.embed.weight[10] = torch.inf  # of the third record alone
    got = together(model, reading_loss, terms, RECORDS)
    assert not all(torch.isfinite(gradients[2]).all() for gradients in got.values())
    others = {name: gradients[[0, 1, 3]] for name, gradients in got.items()}
    assert furthest(others, [expected[i] for i in (0, 1, 3)]) <= 2.0**-45


def test_a_record_without_an_answer_is_not_finite_as_it_is_alone():
    got = together(Reader(), reading_loss, terms, [*RECORDS[:2], ([1, 2], [])])
    for gradients in got.values():
        assert gradients[:2].isfinite().all()
        assert gradients[2].isnan().all()


class Watched:
    """A loss that tells how many records it was called with."""

    def __init__(self, loss=reading_loss, most=99):
        self.loss, self.most, self.sizes = loss, most, []

    def __call__(self, model, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.loss(model, batch)


def step(model, loss, at_once=4):
    """A step without clipping or noise to speak of, which is the mean of the records' own."""
    settings = PrivacyConfig(record_clip=1e9, noise=1e-300)
    steps = PrivateSteps(RECORDS, 4, settings, loss, terms, at_once)
    mean = steps.gradient(model, trained_of(model), RECORDS)
    got = {name: p.grad.clone()[None] for name, p in trained_of(model).items()}
    model.zero_grad(set_to_none=True)
    each = alone(model, reading_loss, RECORDS)
    expected = {name: sum(own[name] for own in each) / 4 for name in got}
    assert furthest(got, [expected]) <= 2.0**-45
    with torch.no_grad():
        assert abs(float(mean - reading_loss(model, RECORDS))) <= 2.0**-45 * float(mean)


def test_a_step_takes_its_records_together_or_as_many_as_it_may():
    for at_once, sizes in ((4, [4]), (3, [3, 1]), (1, [1] * 4)):
        loss = Watched()
        step(Reader(), loss, at_once)
        assert loss.sizes == sizes


def test_where_memory_does_not_suffice_fewer_go_together():
    loss = Watched(most=1)
    step(Reader(), loss)
    assert loss.sizes == [4, 2, 1, 1, 1, 1]


def test_one_record_too_large_for_memory_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        step(Reader(), Watched(most=0))


class Flat(Reader):
    """Its output layer is not told which tokens are whose."""

    def forward(self, ids, real):
        h = self.embed(ids)
        return self.out(h.flatten(0, 1)).view(*ids.shape, TOKENS)


def test_where_a_layer_does_not_see_the_rows_records_go_one_by_one():
    model, loss = Flat(), Watched()
    set_trainable(model, ())
    for p in (*model.out.individual.parameters(), model.out.mixer):
        p.requires_grad_(True)
    step(model, loss)
    assert loss.sizes == [4, 1, 1, 1, 1]
    assert not any("forward" in vars(module) for module in model.modules())


def test_where_a_head_is_trained_records_go_one_by_one():
    model, loss = Reader(), Watched()
    model.fedalt_heads = ("embed",)
    model.embed.requires_grad_(True)
    step(model, loss)
    assert loss.sizes == [1] * 4


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_where_the_batchs_length_counts_records_go_one_by_one(kind):
    model, loss = Reader(), Watched()
    model.rope_type = {"full_attention": kind}
    step(model, loss)
    assert loss.sizes == [1] * 4


def test_a_norm_over_the_batch_mixes_its_records():
    assert keeps_rows_apart(Reader())
    assert not keeps_rows_apart(nn.Sequential(Reader(), nn.BatchNorm1d(3)))


def test_packed_records_go_one_by_one(tiny_config):
    stage, batch = settled(tiny_config)
    loss = Watched(stage.task.loss)
    privacy = PrivacyConfig(record_clip=1.0)
    for packing in (False, True):
        train = replace(tiny_config.train, batch_size=3, max_steps=1, packing=packing)
        train_client(
            stage.model, batch, train, loss, trains=[("individual",)], seed=0, privacy=privacy
        )
    assert loss.sizes == [3, 1, 1, 1]


def settled(config, **changes):
    stage = set_stage(replace(config, lora=replace(config.lora, dropout=0.0), **changes))
    set_trainable(stage.model, ("individual", "mixer", "head"))
    torch.manual_seed(0)
    with torch.no_grad():
        for _, tensor in client_tensors(stage.model):
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return stage, stage.examples(stage.known[0]).train[:3]


@pytest.mark.parametrize("case", ["plain", "recomputed", "quantized"])
def test_of_a_language_model_they_are_so_but_for_float32s_rounding(tiny_config, case):
    """Two layers: chains of fewer than 2^8 roundings of 2^-24."""
    model = replace(tiny_config.model, quantization="fp8" if case == "quantized" else "none")
    stage, batch = settled(tiny_config, model=model)
    batch = [replace(e, answer=e.answer * (n + 1)) for n, e in enumerate(batch)]
    expected = alone(stage.model, stage.task.loss, batch)
    stage.model.train()
    with recomputing(stage.model, case == "recomputed"):
        got = together(stage.model, stage.task.loss, stage.task.count, batch)
    assert furthest(got, expected) <= 2.0**-16

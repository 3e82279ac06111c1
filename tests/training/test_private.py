"""DP-SGD: single records' gradients, clipped and noised as said, and what the steps cost."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fedalt
from fedalt.config import PrivacyConfig
from fedalt.config.settings import config_from_dict
from fedalt.errors import InputError
from fedalt.model.states import client_tensors, set_trainable
from fedalt.report.events import read_events
from fedalt.run.stage import set_stage
from fedalt.store.checkpoint import load_latest
from fedalt.training import private
from fedalt.training.private import PrivateSteps, add_clipped, epsilon_after, sampling_rate

ACCOUNTANT = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None,
    reason="dp-accounting is not installed: the second step of .ci/run has it",
)


@pytest.fixture
def counted(monkeypatch):
    """An accountant of its own where the package is not there: epsilon is steps / 10."""
    monkeypatch.setattr(private, "check_accountant", lambda: None)
    monkeypatch.setattr("fedalt.run.ledger.epsilon_after", lambda steps, *_: steps / 10)


@pytest.fixture
def stage(tiny_config):
    stage = set_stage(replace(tiny_config, lora=replace(tiny_config.lora, dropout=0.0)))
    set_trainable(stage.model, ("individual", "mixer", "head"))
    with torch.no_grad():
        for _, tensor in client_tensors(stage.model):
            tensor.add_(torch.randn_like(tensor), alpha=0.05)
    return stage


def steps_of(stage, noise=1e-300, clip=1e9, batch_size=4):
    examples = stage.examples(stage.known[0]).train
    privacy = PrivacyConfig(record_clip=clip, noise=noise)
    return examples, PrivateSteps(examples, batch_size, privacy, stage.task.loss)


def trained_of(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def single(stage, record):
    """A record's gradient in fp64, in one vector, by autograd's own function."""
    trained = trained_of(stage.model)
    grads = torch.autograd.grad(stage.task.loss(stage.model, [record]), list(trained.values()))
    return torch.cat([g.double().flatten() for g in grads])


def vector(model):
    return torch.cat([p.grad.double().flatten() for p in trained_of(model).values()])


def test_a_step_is_the_sum_of_single_records_gradients_over_the_expected_batch(stage):
    examples, steps = steps_of(stage)
    steps.gradient(stage.model, trained_of(stage.model), examples[:3])
    expected = sum(single(stage, record) for record in examples[:3]) / 4
    got = vector(stage.model)
    assert (got - expected).abs().max() <= 2.0**-22 * expected.abs().max()


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_a_large_gradient_is_scaled_down_to_the_clip_and_a_small_one_stays(stage, share):
    examples, _ = steps_of(stage)
    singles = [single(stage, record) for record in examples[:4]]
    norms = sorted(float(g.norm()) for g in singles)
    clip = norms[0] + share * (norms[-1] - norms[0])
    _, steps = steps_of(stage, clip=clip)
    steps.gradient(stage.model, trained_of(stage.model), examples[:4])
    expected = sum(g * min(1.0, clip / float(g.norm())) for g in singles) / 4
    assert (vector(stage.model) - expected).abs().max() <= 2.0**-22 * expected.abs().max()
    assert norms[0] < clip < norms[-1]


def test_no_record_moves_the_sum_by_more_than_the_clip():
    for size in (1e-3, 1.0, 1e6, 1e30):
        sums = {"a": torch.zeros(5, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
        record = {"a": torch.full((1, 5), size), "b": torch.full((1, 3), -size)}
        add_clipped(sums, record, 0.5)
        norm = math.sqrt(sum(float(t.square().sum()) for t in sums.values()))
        assert norm <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_record_whose_gradient_is_not_finite_is_left_out(value):
    sums = {"a": torch.ones(4, dtype=torch.float64), "b": torch.ones(4, dtype=torch.float64)}
    spoilt = torch.full((4,), value)
    records = {"a": torch.stack([spoilt, torch.ones(4)]), "b": torch.ones(2, 4)}
    add_clipped(sums, records, math.sqrt(2))
    assert all(t.tolist() == [1.5] * 4 for t in sums.values())


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(200_000))


def test_the_noise_is_normal_of_the_standard_deviation_that_is_said():
    """Mean and variance within five of their own standard errors; no number twice."""
    model, privacy = Bowl(), PrivacyConfig(record_clip=0.5, noise=3.0)
    steps = PrivateSteps([0] * 100, 10, privacy, lambda model, batch: model.w.sum() * 0)
    draws = []
    for _ in range(2):
        steps.gradient(model, {"w": model.w}, [])
        draws.append(model.w.grad.double() * 10 / (0.5 * 3.0))
    both = torch.cat(draws)
    count = len(both)
    assert abs(float(both.mean())) < 5 / math.sqrt(count)
    assert abs(float(both.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((both**4).mean()) - 3) < 5 * math.sqrt(96 / count)
    assert abs(float((draws[0] * draws[1]).mean())) < 5 / math.sqrt(len(draws[0]))


def test_no_two_turns_have_the_same_noise():
    model, privacy = Bowl(), PrivacyConfig(record_clip=1.0)
    first, second = (
        PrivateSteps([0], 1, privacy, lambda model, batch: model.w.sum()) for _ in range(2)
    )
    first.gradient(model, {"w": model.w}, [])
    one = model.w.grad.clone()
    second.gradient(model, {"w": model.w}, [])
    assert not torch.equal(one, model.w.grad)


def test_batches_are_poisson_and_records_are_in_them_independently():
    steps = PrivateSteps(list(range(50)), 10, PrivacyConfig(record_clip=1.0), lambda m, b: m)
    draws = np.zeros((4000, 50))
    for row in draws:
        row[steps.batch()] = 1
    assert abs(draws.mean() - 0.2) < 5 * math.sqrt(0.16 / draws.size)
    assert abs(draws.sum(axis=1).var() - 50 * 0.16) < 5 * 50 * 0.16 * math.sqrt(2 / 4000)
    together = (draws[:, 0] * draws[:, 1]).mean()
    assert abs(together - 0.04) < 5 * math.sqrt(0.04 * 0.96 / 4000)


@ACCOUNTANT
def test_epsilon_is_that_of_the_packages_own_examples():
    """Of its tests: noise for exactly (1, 1e-6), and the Rényi divergences of 50 sampled steps.

    A divergence of order a becomes epsilon by  rdp + log((a - 1) / a) - log(δ a) / (a - 1); at best
    over more orders than the five of the example it is that, or a little less.
    """
    assert epsilon_after(1, 1.0, 4.530877117, 1e-6) == pytest.approx(1.0, abs=1e-2)
    told = {1.5: 6.5007e-04, 2.5: 1.0854e-03, 5.0: 2.1808e-03, 50.0: 2.3846e-02, 100.0: 1.6742e02}
    delta = 1e-5
    given = min(
        rdp + math.log((a - 1) / a) - math.log(delta * a) / (a - 1) for a, rdp in told.items()
    )
    got = epsilon_after(50, 0.01, 2.5, delta)
    assert 0.9 * given < got <= given * (1 + 1e-4)


@ACCOUNTANT
def test_epsilon_of_the_plain_gaussian_is_within_its_closed_bound():
    """Of full batches, Rényi: min over a of  k a / 2 σ² + log(1/δ) / (a - 1), and no more."""
    steps, noise, delta = 20, 4.0, 1e-5
    orders = np.linspace(1.01, 200, 20_000)
    bound = (steps * orders / (2 * noise**2) + math.log(1 / delta) / (orders - 1)).min()
    got = epsilon_after(steps, 1.0, noise, delta)
    assert 0.5 * bound < got <= bound * 1.001
    assert epsilon_after(0, 1.0, noise, delta) == 0.0
    assert epsilon_after(40, 1.0, noise, delta) > got


@ACCOUNTANT
def test_orders_that_the_package_gives_up_are_not_told(capfd, caplog):
    assert 10 < epsilon_after(80, 0.2, 1.0, 1e-3) < 11
    assert not capfd.readouterr().err
    assert not caplog.records


def test_the_rate_is_that_of_the_records():
    assert sampling_rate(100, 16) == 0.16
    assert sampling_rate(10, 16) == 1.0


def private_config(config, **privacy):
    privacy = {"record_clip": 1.0, "noise": 1.0, "delta": 1e-3, **privacy}
    lora = replace(config.lora, target_modules=("q_proj",))
    return replace(config, lora=lora, privacy=PrivacyConfig(**privacy))


@pytest.mark.usefixtures("counted")
def test_a_run_tells_every_clients_epsilon_and_keeps_its_account(tiny_config):
    config = private_config(tiny_config)
    result = fedalt.Federation(config).run()
    saved = load_latest(Path(config.out))
    assert saved.record["spent"] == {"ann": 6, "bob": 6, "cyd": 6}
    assert {c["epsilon"] for c in result.results["clients"].values()} == {0.6}
    assert "epsilon" in result.table
    assert "epsilon" in (Path(config.out) / "report" / "clients.md").read_text()


@pytest.mark.usefixtures("counted")
def test_a_resumed_run_spends_once(tiny_config, monkeypatch):
    config = private_config(tiny_config)
    honest = fedalt.run.rounds.turn
    calls = []

    def turn(*args, **more):
        calls.append(args[1].id)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return honest(*args, **more)

    monkeypatch.setattr("fedalt.run.rounds.turn", turn)
    with pytest.raises(KeyboardInterrupt):
        fedalt.Federation(config).run()
    fedalt.Federation(config).run(resume=True)
    assert load_latest(Path(config.out)).record["spent"] == {"ann": 6, "bob": 6, "cyd": 6}


@pytest.mark.usefixtures("counted")
def test_training_stops_before_epsilon_is_exceeded(tiny_config):
    config = replace(private_config(tiny_config, epsilon=0.7), rounds=5)
    result = fedalt.Federation(config).run()
    saved = load_latest(Path(config.out))
    assert saved.round == 2
    assert max(saved.record["spent"].values()) == 6
    assert all("individual" in client for client in result.results["clients"].values())
    again = fedalt.Federation(config).run(resume=True)
    assert again.results == result.results


@pytest.mark.usefixtures("counted")
def test_a_client_that_has_spent_all_is_told_and_the_others_go_on(tiny_config, monkeypatch):
    def epsilon(steps, rate, *_):
        return steps / 10 if rate < 1 else steps  # ann alone has more records than a batch

    monkeypatch.setattr("fedalt.run.ledger.epsilon_after", epsilon)
    config = replace(private_config(tiny_config, epsilon=2.0), rounds=2)
    config = replace(config, train=replace(config.train, batch_size=6))
    fedalt.Federation(config).run()
    events = read_events(Path(config.out) / "metrics.jsonl")
    assert {e["client"] for e in events if e["event"] == "train"} == {"ann"}
    spent = [e for e in events if e["event"] == "spent"]
    assert {e["client"] for e in spent} == {"bob", "cyd"}
    assert spent[0]["reason"] == "its epsilon would be 3, privacy.epsilon is 2"


def test_without_the_accountant_nothing_is_called_private(tiny_config, monkeypatch):
    def find(name, *_):
        return None if name == "dp_accounting" else importlib.machinery.PathFinder.find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(InputError, match=r"wants dp-accounting: pip install 'fedalt\[privacy\]'"):
        fedalt.Federation(private_config(tiny_config)).run()
    assert not Path(tiny_config.out).exists()


@pytest.mark.usefixtures("counted")
def test_a_delta_that_says_nothing_is_refused(tiny_config):
    with pytest.raises(InputError, match=r"privacy\.delta: 0\.5 lets one of ann's 10 records"):
        fedalt.Federation(private_config(tiny_config, delta=0.5)).run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"privacy": {"record_clip": 0}}, r"privacy\.record_clip must be above 0"),
        ({"privacy": {"record_clip": 1, "noise": 0}}, r"privacy\.noise must be above 0"),
        ({"privacy": {"epsilon": 3}}, r"privacy\.epsilon must be left out without"),
        (
            {"privacy": {"record_clip": 1}, "federation": {"holdout": 0.5}},
            r"federation\.holdout must be 0 with privacy\.record_clip",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        config_from_dict(settings)

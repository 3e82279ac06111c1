"""Many clients in one pass: each ends where it would alone, and none sees another."""

from dataclasses import replace

import pytest
import torch

from fedalt.data import load_clients
from fedalt.methods.fedalt import get_method
from fedalt.model.states import adapter_state, load_adapter_state, select
from fedalt.run.stage import load_model
from fedalt.training.client import train_client
from fedalt.training.optimizers import optimizing
from fedalt.training.together import NotTogether, Trainee, train_together
from fedalt_kernels import MixedLoRALinear

RATE, CLIP = 0.01, 0.1
UNEQUAL = {"max_steps": None, "epochs": 2, "batch_size": 2}
"""10, 6 and 4 records make 10, 6 and 4 steps."""


class Clients:
    """Three in one model of doubles, with states of their own, one with more to say than others."""

    def __init__(self, config, wide=True):
        model, self.task = load_model(config, ())
        self.config, self.model = config, model.double() if wide else model
        self.trains = get_method(config.method).trains
        read = [client.read().train for client in load_clients(config.data, config.partition, 0)]
        self.examples = [self.task.encode(records) for records in read]
        start, self.states = adapter_state(model), []
        for number in range(3):
            noise = torch.Generator().manual_seed(number)
            drawn = {n: torch.randn(t.shape, generator=noise).to(t) for n, t in start.items()}
            self.states.append({n: t + 0.1 * drawn[n] for n, t in start.items()})

    def alone(self, moments=None):
        ends = []
        for number, state in enumerate(self.states):
            load_adapter_state(self.model, state)
            result = train_client(
                self.model,
                self.examples[number],
                self.config.train,
                self.task.loss,
                trains=self.trains,
                seed=number,
                count=self.task.count,
                optimizer=None if moments is None else moments[number],
            )
            ends.append((adapter_state(self.model), result))
        return ends

    def together(self, moments=None, states=None, **options):
        trainees = [
            Trainee(state, self.examples[n], n, None if moments is None else moments[n])
            for n, state in enumerate(states or self.states)
        ]
        return train_together(
            self.model,
            trainees,
            self.config.train,
            self.task.losses,
            trains=self.trains,
            length=self.task.length,
            count=self.task.count,
            **options,
        )


@pytest.fixture
def make(tiny_config):
    def made(method="fedalt", wide=True, dropout=0.1, **train):
        settings = {"learning_rate": RATE, "max_grad_norm": CLIP, "weight_decay": 0.1} | train
        return Clients(
            replace(
                tiny_config,
                method=method,
                lora=replace(tiny_config.lora, dropout=dropout),
                train=replace(tiny_config.train, **settings),
            ),
            wide,
        )

    return made


def budget(steps):
    """Of states after as many steps in doubles.

    A gradient, clipped to norm CLIP, is a sum over up to 4 records of 20 tokens, and off by that
    many roundings. AdamW divides by |g| + 1e-8, so a step is off by RATE / 1e-8 of it at most.
    """
    return steps * RATE * (4 * 20 * 2.0**-53 * CLIP) / 1e-8


def apart(left, right):
    assert left.keys() == right.keys()
    return max((left[n].double() - right[n].double()).abs().max().item() for n in left)


CASES = {
    "alike": {},
    "unequal steps": UNEQUAL,
    "no dropout, a fixed rate": {"dropout": 0.0, "lr_scheduler": "constant", "warmup_steps": 0},
    "one after the other": {"method": "feddpa", "max_steps": 5},
    "one plain LoRA": {"method": "fedit"},
    "a scalar gate": {"method": "fedalt-scalar"},
    "recomputed": {"gradient_checkpointing": True},
    "logits in chunks": {"loss_chunk": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_each_ends_where_it_would_alone(make, case):
    clients = make(**CASES[case])
    alone, together = clients.alone(), clients.together()
    for state, (trained, result), (own, told) in zip(clients.states, together, alone, strict=True):
        assert result.steps == told.steps
        assert result.loss == pytest.approx(told.loss, abs=budget(told.steps))
        assert apart(trained, own) <= budget(told.steps)
        assert apart(own, state) > RATE / 2  # far beyond it
    if case == "unequal steps":
        assert [result.steps for _, result in together] == [10, 6, 4]


def test_moments_are_taken_up_and_kept_as_alone(make):
    clients = make(**UNEQUAL)
    kept = [result.optimizer for _, result in clients.alone(moments=[{}] * 3)]
    alone, together = clients.alone(moments=kept), clients.together(moments=kept)
    for (trained, result), (own, told) in zip(together, alone, strict=True):
        assert apart(trained, own) <= budget(told.steps)
        assert apart(result.optimizer, told.optimizer) <= budget(told.steps)
        assert {t.item() for n, t in result.optimizer.items() if n.endswith(".step")} == {
            2 * told.steps
        }


def gradients(monkeypatch, train):
    """By client, the gradients of its first step, before they are clipped."""
    taken = []

    def clip(parameters, norm):
        taken.append([p.grad.double().clone() for p in parameters])

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", clip)
    train()
    monkeypatch.undo()
    return taken


def test_first_gradients_in_single_precision_lose_no_more_than_alone(make, monkeypatch):
    """Each is off by at most twice what it is alone, the padding of others' rows included."""
    found = {
        (wide, way): gradients(monkeypatch, getattr(make(wide=wide, max_steps=1), way))
        for wide in (True, False)
        for way in ("alone", "together")
    }
    for exact, own, together in zip(
        found[True, "alone"], found[False, "alone"], found[False, "together"], strict=True
    ):
        largest = max(g.abs().max() for g in exact)
        lost = max((a - g).abs().max() for a, g in zip(own, exact, strict=True))
        assert lost < 1e-4 * largest
        for gradient, right in zip(together, exact, strict=True):
            assert (gradient - right).abs().max() <= 2 * lost + 2.0**-23 * largest


def test_it_repeats_bit_for_bit_and_leaves_all_else_as_it_was(make):
    clients = make(wide=False)
    before, modules = adapter_state(clients.model), list(clients.model.modules())
    first = clients.together()
    torch.manual_seed(5)
    noise = torch.get_rng_state()
    second = clients.together()
    assert torch.equal(torch.get_rng_state(), noise)
    for (left, told), (right, again) in zip(first, second, strict=True):
        assert told == again
        assert all(torch.equal(left[n], right[n]) for n in left)
    after = adapter_state(clients.model)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert list(clients.model.modules()) == modules
    assert not clients.model.training
    assert not clients.model._forward_pre_hooks


def test_a_spoilt_client_leaves_not_a_bit_in_the_others(make):
    clients = make(wide=False, **UNEQUAL)
    clean = clients.together()
    spoilt = [clients.states[0], {n: t * torch.nan for n, t in clients.states[1].items()}]
    bad = clients.together(states=[*spoilt, clients.states[2]])
    assert all(t.isnan().all() for t in select(bad[1][0], "individual").values())
    for number in (0, 2):
        assert bad[number][1] == clean[number][1]
        assert all(torch.equal(bad[number][0][n], t) for n, t in clean[number][0].items())


def test_a_client_steps_only_while_it_has_steps(make):
    steps = []
    clients = make(**UNEQUAL)
    clients.together(on_step=lambda: steps.append(1))
    assert len(steps) == 10 + 6 + 4


def test_a_failed_training_gives_the_model_back(make):
    clients = make()
    before = adapter_state(clients.model)

    def failing(model, batch):
        raise RuntimeError("no")

    clients.task.losses = failing
    with pytest.raises(RuntimeError, match="no"):
        clients.together()
    assert not clients.model.training
    after = adapter_state(clients.model)
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_a_layer_that_no_gradient_reaches_is_not_trained_together(make):
    clients = make()
    layer = next(m for m in clients.model.modules() if isinstance(m, MixedLoRALinear))
    clients.model.spare = MixedLoRALinear(layer.base, rank=2)
    spare = {n: t for n, t in adapter_state(clients.model).items() if n.startswith("spare")}
    with pytest.raises(NotTogether):
        clients.together(states=[state | spare for state in clients.states])


def test_where_there_is_nothing_to_train_nothing_is_done(make):
    clients = make()
    clients.trains = [("head",)]
    for state, (trained, result) in zip(clients.states, clients.together(), strict=True):
        assert (result.loss, result.steps) == (0.0, 0)
        assert all(torch.equal(trained[n], t) for n, t in state.items())


def test_losses_of_examples_add_up_to_the_mean(make, tiny_config):
    clients = make()
    clients.model.eval()
    for batch in clients.examples:
        mean = clients.task.losses(clients.model, batch).sum() / clients.task.count(batch)
        torch.testing.assert_close(mean, clients.task.loss(clients.model, batch))


def test_the_optimizer_steps_on_rows_of_a_larger_tensor(make):
    """What ``optimizing`` is given are views; what they are rows of is what moves."""
    stacked = torch.zeros(3, 4)
    own = {"x": torch.nn.Parameter(stacked[1])}
    own["x"].grad = torch.ones(4)
    with optimizing(own, make().config.train, {}) as adamw:
        adamw.step()
    assert stacked[1].abs().min() > 0
    assert stacked[[0, 2]].abs().max() == 0

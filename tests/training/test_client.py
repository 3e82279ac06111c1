"""Local training: seeds, batches, the schedule, phases and kept moments."""

from dataclasses import replace
from itertools import chain, islice

import pytest
import torch
from torch import nn

from fedalt.config.schema import TrainConfig
from fedalt.data import load_clients
from fedalt.methods.fedalt import get_method
from fedalt.model.states import adapter_state, as_rest_of_world, client_tensors, load_adapter_state
from fedalt.run.cohort import derive_seed
from fedalt.run.stage import load_model
from fedalt.training.client import batches, count_steps, learning_rate_factor, train_client
from fedalt_kernels import MixedLoRALinear


def test_steps_of_a_round():
    epochs = TrainConfig(batch_size=4, epochs=3, max_steps=None)
    assert [count_steps(n, epochs) for n in (1, 4, 5, 8)] == [3, 3, 6, 6]
    assert count_steps(1000, replace(epochs, max_steps=7)) == 7


def test_learning_rate_rises_and_falls():
    linear = TrainConfig(warmup_steps=2, lr_scheduler="linear")
    factors = [learning_rate_factor(step, 6, linear) for step in range(7)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0])
    cosine = replace(linear, lr_scheduler="cosine")
    assert learning_rate_factor(2, 6, cosine) == pytest.approx(1)
    assert learning_rate_factor(4, 6, cosine) == pytest.approx(0.5)
    assert learning_rate_factor(5, 6, replace(linear, lr_scheduler="constant")) == 1
    assert learning_rate_factor(1, 1, linear) == pytest.approx(2 / 3)  # all steps are warm-up


def test_seeds_belong_to_run_round_and_client():
    seeds = {derive_seed(s, r, c) for s in (0, 1) for r in (1, 2) for c in ("a", "b")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 1, "a") == derive_seed(0, 1, "a")


def test_every_record_is_seen_once_an_epoch():
    order = torch.Generator().manual_seed(0)
    seen = list(islice(batches(range(10), TrainConfig(batch_size=4), order), 6))
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    first, second = (list(chain(*part)) for part in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def text_client(config):
    """The method's model, its task, and ann's examples."""
    model, task = load_model(config, ())
    client = load_clients(config.data, config.partition, 0)[0]
    return model, task, task.encode(client.read().train)


def test_training_repeats_bit_for_bit_and_leaves_the_global_generator_alone(tiny_config):
    model, task, examples = text_client(tiny_config)
    start, ends = adapter_state(model), []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        load_adapter_state(model, start)
        result = train_client(
            model,
            examples,
            tiny_config.train,
            task.loss,
            trains=get_method("fedalt").trains,
            seed=7,
        )
        assert torch.equal(torch.get_rng_state(), before)
        assert not model.training
        ends.append((result, adapter_state(model)))
    (first, left), (second, right) = ends
    assert first == second
    assert (first.steps, first.optimizer) == (3, {})
    assert all(torch.equal(left[name], right[name]) for name in left)
    moved = {name for name in left if not torch.equal(left[name], start[name])}
    assert moved == {name for name in left if "rest_of_world" not in name}


def test_the_mean_loss_of_the_steps_is_told(tiny_config):
    model, task, examples = text_client(tiny_config)
    losses = []

    def loss(model, batch):
        losses.append(task.loss(model, batch))
        return losses[-1]

    result = train_client(model, examples, tiny_config.train, loss, trains=[["individual"]], seed=7)
    assert len(losses) == 3
    assert result.loss == sum(each.item() for each in losses) / 3


def test_feddpa_trains_the_local_then_the_global_adapter_on_one_stream_of_batches(tiny_config):
    """Of five steps two and three; the parts that a phase does not name keep their bits in it."""
    config = replace(tiny_config, method="feddpa", train=replace(tiny_config.train, max_steps=5))
    model, task, examples = text_client(config)
    first_a = {n: t for n, t in adapter_state(model).items() if n.endswith("individual.a")}
    load_adapter_state(model, adapter_state(model) | as_rest_of_world(first_a))
    start, states, seen = adapter_state(model), [], []

    def loss(model, batch):
        seen.append(batch)
        return task.loss(model, batch)

    result = train_client(
        model,
        examples,
        config.train,
        loss,
        trains=get_method("feddpa").trains,
        seed=7,
        on_step=lambda: states.append(adapter_state(model)),
    )
    moved = []
    for before, after in zip([start, *states], states, strict=False):
        parts = {
            name.split(".")[-2] for name in start if not torch.equal(before[name], after[name])
        }
        moved.append(parts)
    assert moved == [{"individual"}] * 2 + [{"rest_of_world"}] * 3
    assert result.steps == 5
    order = torch.Generator().manual_seed(7)
    assert seen == list(islice(batches(examples, config.train, order), 5))


class Lone(nn.Module):
    """One adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = MixedLoRALinear(nn.Linear(6, 5), rank=2, alpha=2, dropout=0.0)


def slope(model, batch):
    """Its gradient is 1 at every trained number."""
    return sum(p.sum() for _, p in client_tensors(model) if p.requires_grad)


def bowl(model, batch):
    """Its gradient changes from step to step, whatever the batch."""
    return sum((p - 0.3).square().sum() for _, p in client_tensors(model) if p.requires_grad)


def test_every_phase_has_a_schedule_of_its_own():
    """Under a constant gradient AdamW steps by the learning rate times its factor: of two linear
    steps 1 and 1/2, of three 1, 2/3 and 1/3.

    Clipped to norm 1 a gradient is 1/√22 and AdamW's ε takes 1e-8 √22 of it; fp32 rounds once a
    step, at numbers below 1.
    """
    config = TrainConfig(max_steps=5, warmup_steps=0, learning_rate=0.01)
    model = Lone()
    start = adapter_state(model)
    train_client(model, [0], config, slope, trains=[["individual"], ["rest_of_world"]], seed=0)
    for name, after in adapter_state(model).items():
        total = {"individual": 1.5, "rest_of_world": 2.0}.get(name.split(".")[-2], 0.0)
        moved = (start[name].double() - after.double()) - 0.01 * total
        assert moved.abs().max() <= 0.02 * 1e-7 + 8 * 2.0**-24


@pytest.mark.parametrize("trains", [[], [["head"]], [()]], ids=str)
def test_where_there_is_nothing_to_train_nothing_is_done(trains):
    model = Lone()
    start = adapter_state(model)
    result = train_client(model, [0], TrainConfig(max_steps=4), bowl, trains=trains, seed=0)
    assert (result.loss, result.steps) == (0.0, 0)
    assert all(torch.equal(t, start[n]) for n, t in adapter_state(model).items())


CONSTANT = TrainConfig(
    lr_scheduler="constant", warmup_steps=0, learning_rate=0.01, weight_decay=0.1
)


def in_parts(steps, keep):
    """The state after one training of so many steps after another, with or without moments."""
    torch.manual_seed(0)
    model, moments = Lone(), {}
    for count in steps:
        result = train_client(
            model,
            [0],
            replace(CONSTANT, max_steps=count),
            bowl,
            trains=get_method("fedalt").trains,
            seed=0,
            optimizer=moments if keep else None,
        )
        moments = result.optimizer
    return adapter_state(model), moments


def test_with_kept_moments_rounds_are_one_uninterrupted_adamw():
    """Bit for bit, where the learning rate is constant; without them they are not."""
    whole, moments = in_parts([5], keep=True)
    parts, kept = in_parts([2, 3], keep=True)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert kept.keys() == moments.keys()
    assert all(torch.equal(kept[name], moments[name]) for name in kept)
    trained = {name for name in whole if "rest_of_world" not in name}
    assert moments.keys() == {
        f"{n}.{m}" for n in trained for m in ("step", "exp_avg", "exp_avg_sq")
    }
    assert {moments[f"{name}.step"].item() for name in trained} == {5}
    forgotten, none = in_parts([2, 3], keep=False)
    assert not none
    assert all(not torch.equal(forgotten[name], whole[name]) for name in trained)


def test_moments_that_are_handed_in_stay_as_they_are():
    _, moments = in_parts([2], keep=True)
    before = {name: tensor.clone() for name, tensor in moments.items()}
    config, trains = replace(CONSTANT, max_steps=1), get_method("fedalt").trains
    train_client(Lone(), [0], config, bowl, trains=trains, seed=0, optimizer=moments)
    assert all(torch.equal(moments[name], before[name]) for name in before)


def test_a_failed_training_leaves_no_gradient_and_no_training_mode():
    model, calls = Lone(), []

    def failing(model, batch):
        calls.append(batch)
        if len(calls) == 2:
            bowl(model, batch).backward()
            raise RuntimeError("out of memory")
        return bowl(model, batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        train_client(model, [0], CONSTANT, failing, trains=[["individual"]], seed=0)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_moments_of_every_phase_are_kept():
    config, trains = replace(CONSTANT, max_steps=3), [["individual"], ["rest_of_world"]]
    kept = train_client(Lone(), [0], config, bowl, trains=trains, seed=0, optimizer={}).optimizer
    steps = {name: kept[name].item() for name in kept if name.endswith(".step")}
    assert steps == {
        "layer.individual.a.step": 1,
        "layer.individual.b.step": 1,
        "layer.rest_of_world.a.step": 2,
        "layer.rest_of_world.b.step": 2,
    }

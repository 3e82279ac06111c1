"""Local training: seeds, batches and the schedule."""

from dataclasses import replace
from itertools import chain, islice

import pytest
import torch

from fedalt.client import batches, count_steps, derive_seed, learning_rate_factor, train_client
from fedalt.config import TrainConfig
from fedalt.data import load_clients
from fedalt.data.tokens import encode
from fedalt.models import adapter_state, load_adapter_state
from fedalt.run import load_model


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


def test_training_repeats_bit_for_bit_and_leaves_the_global_generator_alone(tiny_config):
    model, tokenizer = load_model(tiny_config)
    client = load_clients(tiny_config.data, 0)[0]
    examples = encode(client.train, tokenizer, tiny_config.data)
    start, ends = adapter_state(model), []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        load_adapter_state(model, start)
        result = train_client(model, examples, tiny_config.train, seed=7, pad_id=0)
        assert torch.equal(torch.get_rng_state(), before)
        assert not model.training
        ends.append((result, adapter_state(model)))
    (first, left), (second, right) = ends
    assert first == second
    assert all(torch.equal(left[name], right[name]) for name in left)
    frozen = [name for name in left if "rest_of_world" in name]
    assert frozen
    assert all(torch.equal(left[name], start[name]) for name in frozen)
    assert all(not torch.equal(left[name], start[name]) for name in left if "individual" in name)


def test_every_record_is_seen_once_an_epoch(tiny_config):
    order = torch.Generator().manual_seed(0)
    seen = list(islice(batches(range(10), TrainConfig(batch_size=4), order), 6))
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    first, second = (list(chain(*part)) for part in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second

"""A FedALT round on the built-in base and sample: the Triton kernels give the CPU path's numbers.

Two clients train two steps, exchange, and train one more with dropout; in the interpreter, or on a
GPU. The truth is the same round in float64.
"""

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from fedalt.config.schema import Config, TrainConfig
from fedalt.config.settings import config_from_dict
from fedalt.data import load_clients
from fedalt.errors import InputError
from fedalt.methods.server import rest_of_world
from fedalt.model.states import (
    INDIVIDUAL,
    MIXER,
    adapter_state,
    individual_state,
    load_adapter_state,
    load_rest_of_world,
    select,
)
from fedalt.run.stage import load_model
from fedalt.training.client import train_client
from tests.kernels.budget import excess

RECORDS = 4
ON_GPU = torch.cuda.is_available()


@pytest.fixture
def config() -> Config:
    return config_from_dict(
        {
            "threads": 1,
            "model": {"device": "cuda" if ON_GPU else "cpu"},
            "lora": {"rank": 4, "dropout": 0.1, "target_modules": ["q_proj", "k_proj", "v_proj"]},
            "train": {"batch_size": 2, "max_steps": 2, "learning_rate": 4e-3},
        }
    )


def play(config: Config, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the clients end with, as steps from their start, by part; and their mean losses."""
    model, task = load_model(replace(config, lora=replace(config.lora, impl=impl)), ())
    model.to(dtype)
    clients = load_clients(config.data, config.partition, config.seed)[:2]
    examples = [task.encode(client.read().train[:RECORDS]) for client in clients]

    def train(records: list[Any], settings: TrainConfig, seed: int) -> float:
        trains = [(INDIVIDUAL, MIXER)]
        return train_client(model, records, settings, task.loss, trains=trains, seed=seed).loss

    start = adapter_state(model)
    states, losses = [], []
    for number, records in enumerate(examples):
        load_adapter_state(model, start)
        losses.append(train(records, config.train, number))
        states.append(adapter_state(model))
    rows = rest_of_world([{n: t for n, t in s.items() if "individual" in n} for s in states])
    ends = []
    for number, (state, row, records) in enumerate(zip(states, rows, examples, strict=True)):
        load_adapter_state(model, state)
        load_rest_of_world(model, row)
        losses.append(train(records, replace(config.train, max_steps=1), 10 + number))
        ends.append((individual_state(model), select(adapter_state(model), MIXER)))
    parts = {"a": [], "b": [], "mixer": []}
    for name, tensor in chain.from_iterable(part.items() for pair in ends for part in pair):
        parts[name.rpartition(".")[2]].append((tensor - start[name]).flatten())
    moved = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return moved | {"loss": torch.tensor(losses, dtype=dtype)}


def test_the_same_round(config: Config) -> None:
    truth = play(config, "torch", torch.float64)
    eager = play(config, "reference", torch.float32)
    got = play(config, "triton", torch.float32)
    assert all(value.any() for value in truth.values())
    for name, value in got.items():
        for kind, share in excess(value, eager[name], truth[name], length=128).items():
            assert share <= 1, f"{name}: {kind} error is {share:.2f} times its budget"


def test_an_implementation_that_cannot_run_is_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedalt_kernels import choice

    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    with pytest.raises(InputError, match=r"lora\.impl: impl='triton' cannot run: triton is not"):
        load_model(replace(config, lora=replace(config.lora, impl="triton")), ())

"""What runs on a device without float64, as Apple's GPUs are, makes none there."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fedalt.config.schema import BUILTIN_VIT, DataConfig, ModelConfig
from fedalt.data import ImageRecord, Record
from fedalt.evaluation import Examined, evaluate
from fedalt.model.gates import GateMeter
from fedalt.run.stage import load_model
from fedalt.training.client import train_client

CPU, APPLE = torch.device("cpu"), torch.device("mps")


class Posing(TorchFunctionMode):
    """Takes what is meant for an Apple GPU onto the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(_onto_cpu, (args, kwargs or {}))
        return func(*args, **kwargs)


def _onto_cpu(value):
    return CPU if isinstance(value, str | torch.device) and str(value) == "mps" else value


class NoFloat64(TorchDispatchMode):
    """PyTorch's own refusal to make one there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return made


def _device(tensor):
    """But in a backward pass, where PyTorch asks no ``Posing``."""
    return APPLE if torch._C._current_graph_task_id() == -1 else CPU


@pytest.fixture
def on_apple(monkeypatch):
    """The CPU's tensors say that they lie on an Apple GPU, where no float64 can be made."""

    @contextmanager
    def entered():
        with monkeypatch.context() as patch, Posing(), NoFloat64():
            patch.setattr(torch.Tensor, "device", property(_device))
            yield

    return entered


TEXTS = [Record("which", "yes", options=("no", "yes")), Record("what", "a", options=("a", "b"))]
IMAGES = [ImageRecord(np.full((8, 8), 9 * n, np.uint8), str(n)) for n in range(3)]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.double(),
        lambda x: torch.zeros(2, dtype=torch.float64, device=x.device),
        lambda x: x.softmax(0, dtype=torch.float64),
    ],
)
def test_the_stand_in_refuses_float64(on_apple, make):
    x = torch.ones(2)
    with on_apple():
        assert x.to("mps").device == torch.zeros(2, device="mps").device == APPLE
        with pytest.raises(TypeError, match="float64"):
            make(x)


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("method", ["fedalt", "fedalt-scalar"])
def test_a_client_is_trained_and_scored_without_float64(
    on_apple, tiny_config, kind, method, monkeypatch
):
    """But for the generation of answers, which is transformers' own."""
    monkeypatch.setattr(evaluate, "generate", lambda model, tool, chunk, _: ["yes"] * len(chunk))
    config, records, classes = replace(tiny_config, method=method), TEXTS, ()
    if kind == "image":
        data = DataConfig(path="digits", kind="image")
        config = replace(config, model=ModelConfig(path=BUILTIN_VIT), data=data)
        records, classes = IMAGES, tuple("0123456789")
    model, task = load_model(config, classes)
    examples, meter = task.encode(records), GateMeter(model)
    settings = replace(config.train, micro_batch=1)
    with on_apple():
        trained = train_client(
            model, examples, settings, task.loss, trains=[("individual", "mixer")], seed=0
        )
        (scores,) = task.evaluate(model, [Examined(examples, records)], meter)
        gates = meter.means()
    assert trained.loss > 0
    assert scores["loss"] > 0
    assert all(0 < gate < 1 for gate in gates.values())
    assert gates

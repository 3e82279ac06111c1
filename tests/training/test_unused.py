"""Adapters that no gradient reaches end a client's training after its first step."""

import shutil
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

import fedalt
from fedalt import cli
from fedalt.config.schema import TrainConfig
from fedalt.errors import InputError, InputWarning
from fedalt.model.states import adapter_state
from fedalt.training import UnusedLayers, train_client

TRAINS = (("individual", "mixer", "head"),)
CONFIG = TrainConfig(batch_size=4, max_steps=3, warmup_steps=0)


def train(model, examples, loss, **settings):
    return train_client(model, examples, replace(CONFIG, **settings), loss, trains=TRAINS, seed=0)


def causal_loss(model, batch):
    ids = torch.stack(list(batch))
    return model(input_ids=ids, labels=ids).loss


IDS = list(torch.randint(3, 99, (8, 6), generator=torch.Generator().manual_seed(0)))
SETTINGS = [{}, {"gradient_checkpointing": True}, {"micro_batch": 1}, {"offload_activations": True}]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100}


def mamba():
    return transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_layers_whose_weight_is_read_directly_stop_training_after_one_step(settings):
    model = fedalt.inject(mamba(), rank=2, target_modules="all-linear")
    start, calls = adapter_state(model), []

    def loss(model, batch):
        calls.append(len(batch))
        return causal_loss(model, batch)

    with pytest.raises(UnusedLayers, match=r"lora: backbone.layers.\*.mixer.dt_proj: no gradient"):
        train(model, IDS, loss, **settings)
    assert sum(calls) == CONFIG.batch_size
    after = adapter_state(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in start.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_layers_that_are_called_train_in_silence(settings):
    """Though every B is zero at first, and with it the gradient of every A."""
    config = transformers.LlamaConfig(
        **SIZES, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    fedalt.inject(model, rank=2, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        assert train(model, IDS, causal_loss, **settings).steps == 3


class Experts(nn.Module):
    """Each number goes through the expert that it names."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 4)
        self.pooler = nn.Linear(4, 4)
        self.pools = False

    def forward(self, batch):
        rows = [self.experts[expert](torch.ones(1, 4)) for expert in batch]
        return self.head(torch.cat(rows)).sum() + (self.pooler(rows[0]).sum() if self.pools else 0)


def called(model, batch):
    return model(batch)


def test_experts_without_a_token_are_waited_for():
    model = fedalt.inject(Experts(), rank=2, target_modules=("experts.0", "experts.1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        assert train(model, [0, 1], called, batch_size=1).steps == 3


def test_experts_that_never_get_a_token_are_told():
    targets = [f"experts.{i}" for i in range(3)]
    model = fedalt.inject(Experts(), rank=2, target_modules=targets)
    with pytest.warns(InputWarning, match=r"lora: experts.\*: no gradient reached 2 of these"):
        train(model, [0], called, batch_size=1)


def test_what_is_trained_whole_and_never_runs_is_refused_too():
    settings = {"rank": 2, "target_modules": ("head",), "modules_to_save": ("pooler",)}
    model = fedalt.inject(Experts(), **settings)
    with pytest.raises(InputError, match=r"^lora: pooler: no gradient .* modules_to_save$"):
        train(model, [0], called)
    model.pools = True
    assert train(model, [0], called).steps == 3


def test_a_run_ends_with_one_line_that_names_the_layers(tiny_base, tiny_data, tmp_path, capsys):
    folder = tmp_path / "mamba"
    shutil.copytree(tiny_base, folder)
    config = transformers.MambaConfig(
        **{**SIZES, "vocab_size": 259}, state_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    transformers.MambaForCausalLM(config).save_pretrained(folder)
    settings = [f"model.path={folder}", f"data.path={tiny_data}", f"out={tmp_path / 'run'}"]
    settings += ["lora.rank=2", "evaluate.max_new_tokens=2", "train.max_steps=2"]
    assert cli.main(["run", *(word for each in settings for word in ("-c", each))]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedalt: ")]
    assert len(told) == 1
    assert told[0].startswith("fedalt: lora: backbone.layers.*.mixer.dt_proj: no gradient reached")

"""AdamW of 8 bits: its moments, its pages, and what it wants installed."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedalt.config.schema import TrainConfig
from fedalt.config.settings import config_from_dict
from fedalt.errors import InputError
from fedalt.model.states import adapter_state
from fedalt.training import optimizers
from fedalt.training.client import train_client
from fedalt.training.optimizers import check_optimizer, optimizing
from fedalt_kernels import MixedLoRALinear
from tests.training.memory_cases import same_bits
from tests.training.test_client import bowl

CONFIG = TrainConfig(
    lr_scheduler="constant", warmup_steps=0, learning_rate=0.01, optimizer="adamw_8bit"
)


def in_parts(steps, config=CONFIG):
    """The state after one training after another, with moments that are kept, and these."""
    torch.manual_seed(0)
    model = nn.Sequential(MixedLoRALinear(nn.Linear(600, 5), rank=8))  # its A has 4800 numbers
    moments = {}
    for count in steps:
        part = replace(config, max_steps=count)
        trains = [("individual", "mixer")]
        result = train_client(model, [0], part, bowl, trains=trains, seed=0, optimizer=moments)
        moments = result.optimizer
    return adapter_state(model), moments


def test_kept_moments_of_eight_bits_are_one_uninterrupted_adamw():
    pytest.importorskip("bitsandbytes")
    whole, moments = in_parts([5])
    parts, kept = in_parts([2, 3])
    assert same_bits(whole, parts)
    assert same_bits(moments, kept)
    assert moments["0.individual.a.state1"].dtype == torch.uint8
    assert moments["0.individual.b.state1"].dtype == torch.float32  # 40 numbers
    assert int(kept["0.mixer.step"]) == 5
    plain, _ = in_parts([5], replace(CONFIG, optimizer="adamw"))
    assert not same_bits(whole, plain)
    # Eight steps in a row of at most the learning rate each, in either.
    assert all((whole[n] - plain[n]).abs().max() <= 2 * 5 * 0.01 for n in whole)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_without_bitsandbytes_one_line_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError) as caught:
        check_optimizer(replace(CONFIG, optimizer=name))
    assert str(caught.value) == (
        f"train.optimizer={name} wants bitsandbytes: pip install 'fedalt[quantized]'"
    )
    check_optimizer(replace(CONFIG, optimizer="adamw"))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"optimizer": "paged_adamw_8bit"}, "train.optimizer must be adamw or adamw_8bit on a CPU"),
        ({"offload_activations": True}, "train.offload_activations must be false on a CPU"),
        ({"optimizer": "sgd"}, "train.optimizer must be one of adamw, adamw_8bit, paged_adamw"),
        ({"micro_batch": 0}, "train.micro_batch must be at least 1, or null, got 0"),
        ({"loss_chunk": 0}, "train.loss_chunk must be at least 1, or null, got 0"),
    ],
)
def test_what_a_cpu_or_nobody_has_is_refused(train, message):
    with pytest.raises(InputError, match=message):
        config_from_dict({"train": train})
    on_gpu = {"model": {"device": "cuda"}, "train": train}
    if "CPU" in message:
        config_from_dict(on_gpu)


class Pages(torch.optim.AdamW):
    """Stands in for bitsandbytes' paged optimizer, which wants a GPU: counts its new pages."""

    made = 0

    def get_state_buffer(self, p, dtype=torch.float32):
        Pages.made += 1
        page = torch.zeros(p.shape, dtype=dtype)
        page.is_paged = True
        return page


def test_pages_serve_one_client_after_another(monkeypatch):
    package = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=None, PagedAdamW8bit=Pages))
    monkeypatch.setattr(optimizers, "bitsandbytes", lambda setting: package)
    weight = nn.Parameter(torch.ones(3, 4))
    config, pages = replace(CONFIG, optimizer="paged_adamw_8bit"), []
    for _ in range(2):
        with optimizing({"a": weight}, config, {}) as adamw:
            pages.append(adamw.get_state_buffer(weight, torch.uint8))
            assert not pages[-1].any()
            adamw.state[weight] = {"step": 1, "state1": pages[-1].fill_(7)}
    assert pages[0] is pages[1]
    assert Pages.made == 1

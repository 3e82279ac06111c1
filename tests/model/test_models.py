"""Injection into Hugging Face models."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import fedalt
from fedalt.config.schema import ModelConfig
from fedalt.errors import InputError
from fedalt.model import base as models
from fedalt.model import states
from fedalt_kernels import MixedLoRALinear


@pytest.fixture
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


IDS = torch.tensor([[1, 10, 20, 30, 40]])


def layers_of(model):
    return [name for name, m in model.named_modules() if isinstance(m, MixedLoRALinear)]


def test_injection_replaces_the_named_layers_and_changes_no_output(model):
    before = model(IDS).logits
    assert fedalt.inject(model, rank=2, alpha=4, seed=1) is model
    assert layers_of(model) == [
        f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")
    ]
    assert torch.equal(model(IDS).logits, before)  # B is zero at the start
    trained = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"a", "b", "mixer"}


def test_layers_that_read_one_input_share_their_pass_over_it(model):
    fedalt.inject(model, rank=2, target_modules="all-linear")
    block = model.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    assert attention.q_proj.shared is attention.k_proj.shared is attention.v_proj.shared
    assert attention.q_proj.shared.layers == (
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
    )
    assert mlp.gate_proj.shared is mlp.up_proj.shared is not attention.q_proj.shared
    assert attention.o_proj.shared is mlp.down_proj.shared is None
    assert model.model.layers[1].self_attn.q_proj.shared is not attention.q_proj.shared


def test_all_linear_leaves_the_head_alone(model):
    fedalt.inject(model, rank=2, target_modules="all-linear")
    assert len(layers_of(model)) == 14
    assert not isinstance(model.lm_head, MixedLoRALinear)


def test_gpt2_conv1d_layers_take_adapters():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)).eval()
    before = gpt2(IDS).logits
    fedalt.inject(gpt2, rank=2, target_modules=("c_attn",))
    after = gpt2(IDS).logits
    assert layers_of(gpt2) == ["transformer.h.0.attn.c_attn"]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)  # addmm and linear sum apart
    after.sum().backward()
    layer = gpt2.transformer.h[0].attn.c_attn
    assert layer.individual.b.grad.abs().sum() > 0
    assert layer.base.weight.grad is None


def test_equal_seeds_start_equal(model, tiny_base):
    other = AutoModelForCausalLM.from_pretrained(tiny_base)
    first = states.adapter_state(fedalt.inject(model, rank=2, seed=5))
    second = states.adapter_state(fedalt.inject(other, rank=2, seed=5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = AutoModelForCausalLM.from_pretrained(tiny_base)
    third = states.adapter_state(fedalt.inject(third, rank=2, seed=6))
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_unknown_targets_are_named_with_the_nearest(model):
    with pytest.raises(InputError, match="is named 'q_porj'; did you mean q_proj"):
        fedalt.inject(model, target_modules=("q_porj",))
    assert layers_of(model) == []


def test_a_second_injection_is_refused(model):
    fedalt.inject(model, rank=2)
    with pytest.raises(InputError, match="has its adapters already"):
        fedalt.inject(model, rank=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saved_module_is_trained_whole_in_float32_over_any_base(tiny_base, dtype):
    """Its logits are rounded as fp32 rounds 32 products and their sum, not as the base does."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype).eval()
    fedalt.inject(model, rank=2, modules_to_save=("lm_head",))
    wide = model(IDS).logits
    assert model.lm_head.weight.dtype == wide.dtype == torch.float32
    hidden = model.model(IDS).last_hidden_state.double()
    exact = hidden @ model.lm_head.weight.double().T
    sizes = hidden.abs() @ model.lm_head.weight.double().abs().T
    assert ((wide.double() - exact).abs() <= 33 * 2.0**-24 * sizes).all()
    name, before = "lm_head.weight", states.adapter_state(model)
    assert before[name].dtype == torch.float32
    states.set_trainable(model, ("head",))
    wide.sum().backward()
    assert model.lm_head.weight.grad.any()
    assert model.model.layers[0].mlp.up_proj.weight.grad is None
    states.load_adapter_state(model, {**before, name: before[name] + 1})
    assert torch.equal(states.adapter_state(model)[name], before[name] + 1)


def test_a_saved_module_takes_no_adapter_and_must_be_there(model):
    targets = ("q_proj", "lm_head")
    fedalt.inject(model, rank=2, target_modules=targets, modules_to_save=("lm_head",))
    assert [name.rpartition(".")[2] for name in layers_of(model)] == ["q_proj", "q_proj"]
    assert isinstance(model.lm_head, nn.Linear)


def test_a_saved_module_that_is_not_there_is_named(model):
    with pytest.raises(InputError, match="no module is named 'lm_haed'; known: model, lm_head"):
        fedalt.inject(model, rank=2, modules_to_save=("lm_haed",))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(path="no/such-model"), "model.path: cannot load 'no/such-model'"),
        (ModelConfig(device="tpu9"), "model.device: 'tpu9' cannot be used"),
    ],
)
def test_bad_models_are_named(config, message):
    with pytest.raises(InputError, match=message):
        models.load_base(config)

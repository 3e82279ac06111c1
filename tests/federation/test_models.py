"""Injection into Hugging Face models, and clients as states."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import fedalt
from fedalt import models
from fedalt.config import ModelConfig
from fedalt.errors import InputError
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
    first = models.adapter_state(fedalt.inject(model, rank=2, seed=5))
    second = models.adapter_state(fedalt.inject(other, rank=2, seed=5))
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = AutoModelForCausalLM.from_pretrained(tiny_base)
    third = models.adapter_state(fedalt.inject(third, rank=2, seed=6))
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_unknown_targets_are_named_with_the_nearest(model):
    with pytest.raises(InputError, match="is named 'q_porj'; did you mean q_proj"):
        fedalt.inject(model, target_modules=("q_porj",))
    assert layers_of(model) == []


def test_a_second_injection_is_refused(model):
    fedalt.inject(model, rank=2)
    with pytest.raises(InputError, match="has its adapters already"):
        fedalt.inject(model, rank=2)


def test_a_client_swaps_in_and_out_without_loss(model):
    fedalt.inject(model, rank=2, seed=0)
    empty = models.adapter_state(model)
    torch.manual_seed(0)
    client = {name: torch.randn_like(tensor) for name, tensor in empty.items()}
    models.load_adapter_state(model, client)
    changed = model(IDS).logits
    models.load_adapter_state(model, empty)
    models.load_adapter_state(model, client)
    assert torch.equal(model(IDS).logits, changed)
    assert all(torch.equal(t, client[n]) for n, t in models.adapter_state(model).items())


def test_only_the_individual_adapter_leaves_a_client(model):
    fedalt.inject(model, rank=2)
    update = fedalt.individual_state(model)
    assert {name.rsplit(".", 2)[1] for name in update} == {"individual"}
    assert len(update) == 2 * len(layers_of(model))


def test_rest_of_world_goes_into_the_frozen_adapter_alone(model):
    fedalt.inject(model, rank=2)
    before = models.adapter_state(model)
    torch.manual_seed(0)
    updates = [
        {n: torch.randn_like(t) for n, t in fedalt.individual_state(model).items()}
        for _ in range(3)
    ]
    rows = fedalt.rest_of_world(updates)
    fedalt.load_rest_of_world(model, rows[1])
    after = models.adapter_state(model)
    for name, tensor in after.items():
        if ".rest_of_world." in name:
            mean = rows[1][name.replace(".rest_of_world.", ".individual.")]
            assert torch.equal(tensor, mean)
        else:
            assert torch.equal(tensor, before[name])


def test_a_foreign_state_is_refused_by_name(model):
    fedalt.inject(model, rank=2)
    state = models.adapter_state(model)
    name = next(iter(state))
    with pytest.raises(ValueError, match=f"{name} has shape"):
        models.load_adapter_state(model, {**state, name: torch.zeros(7, 7)})
    missing = {key: tensor for key, tensor in state.items() if key != name}
    with pytest.raises(ValueError, match=f"{name} is missing"):
        models.load_adapter_state(model, missing)
    with pytest.raises(ValueError, match="zzz is not in the model"):
        models.load_adapter_state(model, {**state, "zzz": torch.zeros(1)})


def test_base_fingerprint_sees_the_base_and_not_the_adapters(model):
    fedalt.inject(model, rank=2)
    first = models.base_fingerprint(model)
    state = models.adapter_state(model)
    models.load_adapter_state(model, {n: t + 1 for n, t in state.items()})
    assert models.base_fingerprint(model) == first
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert models.base_fingerprint(model) != first


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

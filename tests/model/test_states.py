"""Clients as states: parts of them, in and out of a model, and the base below them."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import fedalt
from fedalt.model import states

IDS = torch.tensor([[1, 10, 20, 30, 40]])


@pytest.fixture
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


def test_a_client_swaps_in_and_out_without_loss(model):
    fedalt.inject(model, rank=2, seed=0)
    empty = states.adapter_state(model)
    torch.manual_seed(0)
    client = {name: torch.randn_like(tensor) for name, tensor in empty.items()}
    states.load_adapter_state(model, client)
    changed = model(IDS).logits
    states.load_adapter_state(model, empty)
    states.load_adapter_state(model, client)
    assert torch.equal(model(IDS).logits, changed)
    assert all(torch.equal(t, client[n]) for n, t in states.adapter_state(model).items())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.q_proj.individual.a", "individual.a"),
        ("individual.b", "individual.b"),
        ("model.layers.0.q_proj.rest_of_world.b", "rest_of_world.b"),
        ("model.layers.0.q_proj.mixer", "mixer"),
        ("mixer", "mixer"),
        ("lm_head.weight", "head"),
        ("classifier.out.bias", "head"),
        ("weight", "head"),
    ],
)
def test_every_tensor_is_one_part(name, part):
    assert states.part_of(name) == part
    parts = ["individual.a", "individual.b", "rest_of_world.a", "rest_of_world.b", "mixer", "head"]
    assert [each for each in parts if states.is_part(name, each)] == [part]
    wholes = [each for each in ("individual", "rest_of_world") if states.is_part(name, each)]
    assert wholes == [each for each in ("individual", "rest_of_world") if part.startswith(each)]


def test_select_takes_parts_and_half_parts():
    names = ["q.individual.a", "q.individual.b", "q.rest_of_world.b", "q.mixer", "head.weight"]
    state = dict.fromkeys(names, torch.zeros(1))
    assert list(states.select(state, "individual")) == names[:2]
    assert list(states.select(state, "individual.b", "head")) == [names[1], names[4]]
    assert list(states.select(state)) == []
    renamed = states.as_rest_of_world(states.select(state, "individual", "mixer"))
    assert list(renamed) == ["q.rest_of_world.a", "q.rest_of_world.b", "q.mixer"]


@pytest.mark.parametrize(
    "parts",
    [(), ("individual.b",), ("rest_of_world",), ("individual", "mixer"), ("mixer", "head")],
    ids=str,
)
def test_only_the_named_parts_ask_for_a_gradient(model, parts):
    fedalt.inject(model, rank=2, modules_to_save=("lm_head",))
    states.set_trainable(model, parts)
    asking = {name for name, p in model.named_parameters() if p.requires_grad}
    assert asking == states.select(states.adapter_state(model), *parts).keys()
    if parts:
        nn.init.ones_(model.model.layers[0].self_attn.q_proj.individual.b)
        model(IDS).logits.sum().backward()
        got = {name for name, p in model.named_parameters() if p.grad is not None}
        assert got == asking


@pytest.mark.parametrize("mixer", [True, "scalar"])
def test_a_fresh_state_is_drawn_from_its_seed_and_keeps_the_head(model, mixer):
    fedalt.inject(model, rank=2, mixer=mixer, modules_to_save=("lm_head",))
    ones = {n: torch.ones_like(t) for n, t in states.adapter_state(model).items()}
    states.load_adapter_state(model, ones)
    noise = torch.get_rng_state()
    first, again, other = (states.fresh_state(model, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), noise)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        part = states.part_of(name)
        if part == "individual.a" or (part == "mixer" and mixer is True):
            assert not torch.equal(tensor, other[name])
            assert 0 < tensor.abs().max() <= tensor.shape[1] ** -0.5
        else:
            assert torch.equal(tensor, ones[name] if part == "head" else ones[name] * 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_base_weights_are_the_first_ones_plus_the_change(tiny_base, dtype):
    """Not plus all changes so far; rounded once to the base's dtype; and without a change, as
    they were."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype)
    fedalt.inject(model, rank=2, target_modules=("q_proj",))
    layers = dict(states.mixed_layers(model))
    first = {name: layer.weight.clone() for name, layer in layers.items()}
    one, two = layers
    base = states.BaseWeights(model)
    torch.manual_seed(0)
    for _ in range(2):
        change = torch.randn(32, 32)
        base.add({one: change})
        assert torch.equal(layers[one].weight, (first[one].float() + change).to(dtype))
        assert torch.equal(layers[two].weight, first[two])
    base.add({})
    assert torch.equal(layers[one].weight, first[one])


def test_base_weights_that_are_stored_transposed_change_alike():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)).eval()
    fedalt.inject(gpt2, rank=2, target_modules=("c_attn",))
    ((name, layer),) = states.mixed_layers(gpt2)
    first, change = layer.base.weight.clone(), torch.arange(96 * 32).reshape(96, 32) / 64
    states.BaseWeights(gpt2).add({name: change})
    assert torch.equal(layer.base.weight, first + change.T)


@pytest.mark.parametrize("mixer", [True, "scalar", (0.5, 0.5)])
@pytest.mark.parametrize("part", ["individual", "rest_of_world"])
def test_one_adapter_alone_has_weight_1_while_it_lasts(model, mixer, part):
    """As a layer whose adapters both have weight 1 and of which the other is zero."""
    fedalt.inject(model, rank=2, mixer=mixer)
    torch.manual_seed(0)
    state = {n: torch.randn_like(t) / 4 for n, t in states.adapter_state(model).items()}
    states.load_adapter_state(model, state)
    names, both = list(states.adapter_state(model)), model(IDS).logits
    with states.adapter_alone(model, part):
        alone = model(IDS).logits
    with pytest.raises(KeyError), states.adapter_alone(model, part):
        raise KeyError
    assert list(states.adapter_state(model)) == names
    assert torch.equal(model(IDS).logits, both)
    other = {"individual": "rest_of_world", "rest_of_world": "individual"}[part]
    for _, layer in states.mixed_layers(model):
        layer.mixer, layer.fixed = None, (1.0, 1.0)
    zeroed = {
        n: t * 0 if states.is_part(n, other) else t
        for n, t in state.items()
        if states.part_of(n) != "mixer"
    }
    states.load_adapter_state(model, zeroed)
    assert torch.equal(model(IDS).logits, alone)


def test_a_lone_adapter_takes_the_rank_of_the_state_that_is_loaded(model):
    """Two of rank 3 beside two of rank 2: the scale follows each, alpha / rank.

    A chain of 32 + 3 products and a few more roundings, each 2⁻²⁴ of the terms' sizes.
    """
    fedalt.inject(model, rank=2, alpha=6, dropout=0.0, rest_of_world=False)
    layers = dict(states.mixed_layers(model))
    wide = [name for name in layers if name.endswith("q_proj")]
    torch.manual_seed(0)
    state = {n: torch.randn_like(t) for n, t in states.adapter_state(model).items()}
    for name in wide:
        state |= {f"{name}.individual.a": torch.randn(3, 32)}
        state |= {f"{name}.individual.b": torch.randn(32, 3)}
    states.load_adapter_state(model, state)
    x = torch.randn(4, 32)
    for name, layer in layers.items():
        rank, scale = (3, 2.0) if name in wide else (2, 3.0)
        a, b = state[f"{name}.individual.a"], state[f"{name}.individual.b"]
        assert (layer.rank, layer.scaling, a.shape[0]) == (rank, scale, rank)
        assert layer.individual.a.requires_grad
        terms = layer.weight.double() + scale * b.double() @ a.double()
        sizes = layer.weight.double().abs() + scale * b.double().abs() @ a.double().abs()
        error = layer(x).double() - x.double() @ terms.T
        assert (error.abs() <= 40 * 2.0**-24 * (x.double().abs() @ sizes.T)).all()
    assert all(torch.equal(t, state[n]) for n, t in states.adapter_state(model).items())


def test_another_rank_is_refused_where_there_is_a_rest_of_world(model):
    fedalt.inject(model, rank=2)
    state = states.adapter_state(model)
    name = next(name for name in state if name.endswith("individual.a"))
    with pytest.raises(
        ValueError, match=r"individual.a has shape \(3, 32\), the model wants \(2, 32\)"
    ):
        states.load_adapter_state(model, {**state, name: torch.zeros(3, 32)})


def test_only_the_individual_adapter_leaves_a_client(model):
    fedalt.inject(model, rank=2)
    update = fedalt.individual_state(model)
    assert {name.rsplit(".", 2)[1] for name in update} == {"individual"}
    assert len(update) == 2 * len(list(states.mixed_layers(model)))


def test_rest_of_world_goes_into_the_frozen_adapter_alone(model):
    fedalt.inject(model, rank=2)
    before = states.adapter_state(model)
    torch.manual_seed(0)
    updates = [
        {n: torch.randn_like(t) for n, t in fedalt.individual_state(model).items()}
        for _ in range(3)
    ]
    rows = fedalt.rest_of_world(updates)
    fedalt.load_rest_of_world(model, rows[1])
    after = states.adapter_state(model)
    for name, tensor in after.items():
        if ".rest_of_world." in name:
            mean = rows[1][name.replace(".rest_of_world.", ".individual.")]
            assert torch.equal(tensor, mean)
        else:
            assert torch.equal(tensor, before[name])


def test_a_foreign_state_is_refused_by_name(model):
    fedalt.inject(model, rank=2)
    state = states.adapter_state(model)
    name = next(iter(state))
    with pytest.raises(ValueError, match=f"{name} has shape"):
        states.load_adapter_state(model, {**state, name: torch.zeros(7, 7)})
    missing = {key: tensor for key, tensor in state.items() if key != name}
    with pytest.raises(ValueError, match=f"{name} is missing"):
        states.load_adapter_state(model, missing)
    with pytest.raises(ValueError, match="zzz is not in the model"):
        states.load_adapter_state(model, {**state, "zzz": torch.zeros(1)})


def test_base_fingerprint_sees_the_base_and_not_the_adapters(model):
    fedalt.inject(model, rank=2)
    first = states.base_fingerprint(model)
    state = states.adapter_state(model)
    states.load_adapter_state(model, {n: t + 1 for n, t in state.items()})
    assert states.base_fingerprint(model) == first
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert states.base_fingerprint(model) != first

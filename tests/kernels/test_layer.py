"""MixedLoRALinear: its parameters, their start, what it wraps and what it refuses."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from fedalt_kernels import MixedLoRALinear, mixed_lora_linear


class Conv1D(nn.Module):
    """Hugging Face's layer of this name: a linear layer that stores its weight as [K, N]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def test_parameters_have_the_documented_names_shapes_and_flags() -> None:
    layer = MixedLoRALinear(nn.Linear(16, 12), rank=3)
    assert {name: (list(p.shape), p.requires_grad) for name, p in layer.named_parameters()} == {
        "base.weight": ([12, 16], False),
        "base.bias": ([12], False),
        "individual.a": ([3, 16], True),
        "individual.b": ([12, 3], True),
        "rest_of_world.a": ([3, 16], False),
        "rest_of_world.b": ([12, 3], False),
        "mixer": ([2, 16], True),
    }


@pytest.mark.parametrize("base", [nn.Linear(16, 12), nn.Linear(16, 12, bias=False), Conv1D(12, 16)])
def test_starts_as_the_base(base: nn.Module) -> None:
    x = torch.randn(2, 5, 16)
    expected = base(x)
    layer = MixedLoRALinear(base, rank=3)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert (layer.in_features, layer.out_features) == (16, 12)
    assert torch.allclose(nn.functional.linear(x, layer.weight, layer.bias), expected, atol=1e-6)


def test_start_is_kaiming_uniform_and_zero() -> None:
    layer = MixedLoRALinear(nn.Linear(400, 12), rank=40)
    bound = 1 / math.sqrt(400)
    for parameter in (layer.individual.a, layer.mixer):
        assert bound * 0.9 < parameter.abs().max() <= bound
    for parameter in (layer.individual.b, layer.rest_of_world.a, layer.rest_of_world.b):
        assert not parameter.any()


def test_reset_follows_its_generator() -> None:
    layers = [MixedLoRALinear(nn.Linear(16, 12)) for _ in range(2)]
    for layer in layers:
        layer.reset_parameters(torch.Generator().manual_seed(4))
    one, two = (layer.state_dict() for layer in layers)
    for name in ("individual.a", "mixer"):
        assert torch.equal(one[name], two[name])


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_adapters_are_wide_enough_to_train(base: torch.dtype, adapter: torch.dtype) -> None:
    layer = MixedLoRALinear(nn.Linear(16, 12, dtype=base))
    assert layer.base.weight.dtype == base
    assert {layer.mixer.dtype, *(p.dtype for p in layer.individual.parameters())} == {adapter}
    y = layer(torch.randn(3, 16, dtype=base))
    assert y.dtype == base
    y.sum().backward()
    assert layer.individual.b.grad.dtype == adapter


def test_plain_lora_has_neither_rest_of_world_nor_mixer() -> None:
    layer = MixedLoRALinear(nn.Linear(16, 12), rank=2, dropout=0, rest_of_world=False)
    names = {name for name, _ in layer.named_parameters()}
    assert names == {"base.weight", "base.bias", "individual.a", "individual.b"}
    nn.init.normal_(layer.individual.b)
    x = torch.randn(3, 16)
    expected = layer.base(x) + 16 * (x @ layer.individual.a.T @ layer.individual.b.T)
    assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", [(0.25, 0.75), None])
def test_fixed_mixer_has_no_parameter(mixer: tuple[float, ...] | None) -> None:
    layer = MixedLoRALinear(nn.Linear(16, 12), dropout=0, mixer=mixer)
    assert "mixer" not in dict(layer.named_parameters())
    nn.init.normal_(layer.individual.b)
    x = torch.randn(3, 16)
    expected = mixed_lora_linear(
        x, layer.weight, layer.bias, layer.adapters, mixer, scaling=4.0, impl="reference"
    )
    assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_dropout_only_in_training_mode() -> None:
    layer = MixedLoRALinear(nn.Linear(64, 12), dropout=0.5)
    nn.init.normal_(layer.individual.b)
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_repr_names_the_settings() -> None:
    assert "rank=8, alpha=32, dropout=0.05, impl='auto'" in repr(MixedLoRALinear(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base": nn.Identity()}, TypeError, "base must be an nn.Linear or a Conv1D, got Identity"),
        ({"rank": 0}, ValueError, "rank must be an integer of at least 1, got 0"),
        ({"rank": 2.0}, ValueError, "rank must be an integer of at least 1, got 2.0"),
        ({"alpha": 0}, ValueError, "alpha must be a positive number, got 0"),
        ({"alpha": float("nan")}, ValueError, "alpha must be a positive number, got nan"),
        ({"dropout": 1.0}, ValueError, "dropout must be in [0, 1), got 1.0"),
        ({"mixer": (1.0,)}, ValueError, "mixer must be True, 'scalar', None or 2 finite floats, got (1.0,)"),
        ({"mixer": False}, ValueError, "mixer must be True, 'scalar', None or 2 finite floats, got False"),
        (
            {"mixer": (0.5, 0.5), "rest_of_world": False},
            ValueError,
            "mixer must be True or None without a Rest-of-World, got (0.5, 0.5)",
        ),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, torch, triton, reference"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        MixedLoRALinear(**{"base": nn.Linear(4, 4), **changes})


def test_packed_weight_is_refused() -> None:
    base = nn.Linear(4, 4)
    base.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"base\.weight must be floating point, got torch\.uint8"):
        MixedLoRALinear(base)


def test_a_generator_of_another_device_than_the_base_is_no_error() -> None:
    layer = MixedLoRALinear(nn.Linear(6, 5, device="meta"))
    layer.reset_parameters(torch.Generator().manual_seed(3))
    assert layer.individual.a.is_meta

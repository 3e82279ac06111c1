"""MixedLoRALinear: its parameters, their start, what it wraps and what it refuses."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from fedalt_kernels import MixedLoRALinear, mixed_lora_linear

from .budget import assert_within_budget
from .parity import pool


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


def filled(base: nn.Module, seed: int, **settings: Any) -> MixedLoRALinear:
    """A layer of rank 3, alpha 6, whose every parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    layer = MixedLoRALinear(base, rank=3, alpha=6, **{"dropout": 0.0, **settings})
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            over = 1 if name == "mixer" else parameter.shape[-1]
            parameter.copy_(drawn / over**0.5)
    return layer


def test_a_scalar_mixer_is_one_trained_pair_that_starts_at_a_half_each() -> None:
    layer = MixedLoRALinear(nn.Linear(16, 12), mixer="scalar")
    assert layer.mixer.shape == (2,)
    assert layer.mixer.requires_grad
    assert torch.softmax(layer.mixer, 0).tolist() == [0.5, 0.5]
    layer.mixer.data += 3
    layer.reset_parameters(torch.Generator().manual_seed(0))
    assert layer.mixer.tolist() == [0, 0]


def test_a_scalar_mixer_weighs_every_token_alike_by_hand() -> None:
    """W = A_0 = A_1 = B_0 = 1, B_1 = 5, s = 2, gates 1/4, 3/4: y = x (1 + 2 (1/4 + 15/4))."""
    base = nn.Linear(1, 1, bias=False)
    layer = MixedLoRALinear(base, rank=1, alpha=2, dropout=0.0, mixer="scalar")
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(5.0 if name == "rest_of_world.b" else 1.0)
        layer.mixer.copy_(torch.tensor([0.0, math.log(3.0)]))
    y = layer(torch.tensor([[1.0], [-2.0], [0.0]]))
    assert y.flatten().tolist() == pytest.approx([9, -18, 0], rel=2**-21)


def plain_scalar(layer: MixedLoRALinear, x: torch.Tensor, wide: bool) -> tuple[torch.Tensor, dict]:
    """The formula in plain PyTorch, in x's dtype or in float64, and its leaves."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().double() if wide else tensor.detach()

    leaves = {"x": cast(x).requires_grad_()}
    trained = [(name, p) for name, p in layer.named_parameters() if p.requires_grad]
    leaves |= {name: cast(p).requires_grad_() for name, p in trained}
    row = layer.rest_of_world
    factors = [
        (leaves["individual.a"], leaves["individual.b"]),
        (cast(row.a), cast(row.b)),
    ]
    x, dtype = leaves["x"], leaves["x"].dtype
    y = nn.functional.linear(x, cast(layer.weight), cast(layer.bias))
    for gate, (a, b) in zip(torch.softmax(leaves["mixer"], 0), factors, strict=True):
        low = (gate * (x @ a.to(dtype).T)).to(dtype)
        y = y + layer.scaling * (low @ b.to(dtype).T)
    return y, leaves


@pytest.mark.parametrize("rows", [1, 7, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scalar_gates_and_their_gradients_keep_the_error_budget(
    rows: int, dtype: torch.dtype
) -> None:
    """Output and gradients against the formula in float64, within eager PyTorch's own error."""
    results: dict[str, list[dict[str, torch.Tensor]]] = {"got": [], "eager": [], "truth": []}
    for seed in range(max(8, 64 // rows)):
        generator = torch.Generator().manual_seed(1000 + seed)
        x = torch.randn(rows, 17, generator=generator).to(dtype)
        dy = torch.randn(rows, 33, generator=generator).to(dtype)
        layer = filled(nn.Linear(17, 33, dtype=dtype), seed, mixer="scalar")
        leaves = {"x": x.clone().requires_grad_()}
        leaves |= {name: p for name, p in layer.named_parameters() if p.requires_grad}
        assert list(leaves) == ["x", "mixer", "individual.a", "individual.b"]
        runs = {"got": (layer(leaves["x"]), leaves)}
        runs |= {kind: plain_scalar(layer, x, kind == "truth") for kind in ("eager", "truth")}
        for kind, (y, own) in runs.items():
            grads = torch.autograd.grad(y, list(own.values()), dy.to(y.dtype))
            named = {f"d{name}": grad for name, grad in zip(own, grads, strict=True)}
            results[kind].append({"y": y.detach()} | named)
    pooled = {kind: pool(each) for kind, each in results.items()}
    assert_within_budget(pooled["got"], pooled["eager"], pooled["truth"], length=max(rows, 33))


def test_a_scalar_mixer_passes_a_gradient_check_in_float64() -> None:
    base = nn.Linear(5, 4, dtype=torch.float64)
    layer = filled(base, 0, mixer="scalar")
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trained = [p for p in layer.parameters() if p.requires_grad]
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def output(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x.requires_grad_(), *trained))


def test_another_rank_begins_as_the_base_with_the_scale_of_its_rank() -> None:
    layer = filled(nn.Linear(16, 12), 0, rest_of_world=False)
    layer.set_rank(5)
    assert (layer.individual.a.shape, layer.individual.b.shape) == ((5, 16), (12, 5))
    assert not layer.individual.a.any()
    assert not layer.individual.b.any()
    assert layer.individual.a.requires_grad
    assert layer.individual.b.requires_grad
    assert (layer.rank, layer.scaling) == (5, 6 / 5)
    assert "rank=5" in repr(layer)
    x = torch.randn(2, 16)
    assert torch.equal(layer(x), layer.base(x))
    with torch.no_grad():
        layer.individual.a[4, 0], layer.individual.b[0, 4] = 1.0, 1.0
    moved = layer(x).double() - layer.base(x).double()
    error = moved[:, 0] - 1.2 * x[:, 0].double()  # two roundings of y, one of the product
    assert (error.abs() <= 3 * 2.0**-24 * (layer(x).abs().max() + x.abs().max() * 1.2)).all()
    assert not moved[:, 1:].any()


def test_another_rank_is_refused_beside_a_rest_of_world() -> None:
    layer = MixedLoRALinear(nn.Linear(16, 12))
    with pytest.raises(ValueError, match="set_rank wants a layer without a Rest-of-World"):
        layer.set_rank(4)
    assert layer.rank == 8


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
        ({"base": nn.Identity()}, TypeError, "or an Fp8Linear, got Identity"),
        ({"rank": 0}, ValueError, "rank must be an integer of at least 1, got 0"),
        ({"rank": 2.0}, ValueError, "rank must be an integer of at least 1, got 2.0"),
        ({"alpha": 0}, ValueError, "alpha must be a positive number, got 0"),
        ({"alpha": float("nan")}, ValueError, "alpha must be a positive number, got nan"),
        ({"dropout": 1.0}, ValueError, "dropout must be in [0, 1), got 1.0"),
        (
            {"mixer": (1.0,)},
            ValueError,
            "mixer must be True, 'scalar', None or 2 finite floats, got (1.0,)",
        ),
        (
            {"mixer": False},
            ValueError,
            "mixer must be True, 'scalar', None or 2 finite floats, got False",
        ),
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

"""Shapes, modes of calling, and every refusal of mixed_lora_linear."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fedalt_kernels import Adapter, MixedLoRALinear, mixed_lora_linear

from .cases import SCALING, Case, Inputs, build, run


def call(inputs: Inputs, **changes: Any) -> torch.Tensor:
    arguments = {
        "x": inputs.x,
        "weight": inputs.weight,
        "bias": inputs.bias,
        "adapters": inputs.adapters,
        "mixer": inputs.mixer,
        "scaling": SCALING,
        **changes,
    }
    return mixed_lora_linear(**arguments)


def trained_layer(dropout: float = 0.0) -> MixedLoRALinear:
    """A layer none of whose factors is zero."""
    layer = MixedLoRALinear(torch.nn.Linear(16, 12), rank=2, dropout=dropout)
    for parameter in (layer.individual.b, layer.rest_of_world.a, layer.rest_of_world.b):
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_leading_shapes(lead: tuple[int, ...], dropout: float, impl: str) -> None:
    inputs = build(Case(frozen=(1,)))
    x = torch.randn(*lead, 17, dtype=torch.float64, requires_grad=True)
    y = call(inputs, x=x, dropout_p=dropout, seed=1, impl=impl)
    assert y.shape == (*lead, 33)
    y.sum().backward()
    assert x.grad.shape == x.shape
    flat = call(inputs, x=x.reshape(-1, 17), dropout_p=dropout, seed=1, impl=impl)
    assert torch.allclose(y.reshape(-1, 33), flat)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_views_of_x_weight_and_dy(dropout: float) -> None:
    inputs = build(Case())
    expected = run(mixed_lora_linear, inputs, dropout)
    views = replace(
        inputs,
        x=inputs.x.detach().t().contiguous().t().requires_grad_(),
        weight=inputs.weight.t().contiguous().t(),
        dy=inputs.dy.t().contiguous().t(),
    )
    for name, value in run(mixed_lora_linear, views, dropout).items():
        assert torch.allclose(value, expected[name], rtol=1e-12, atol=1e-14), name


def test_nothing_asks_for_a_gradient() -> None:
    inputs = build(Case(frozen=(0, 1)))
    with torch.no_grad():
        assert not call(inputs).requires_grad
    assert not call(inputs, x=inputs.x.detach(), mixer=inputs.mixer.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_and_returns_the_autocast_dtype(dtype: torch.dtype) -> None:
    case = Case(dtype=torch.float32, param_dtype=torch.float32)
    inputs = build(case)
    cast = replace(
        inputs,
        x=inputs.x.detach().to(dtype).requires_grad_(),
        weight=inputs.weight.to(dtype),
        bias=inputs.bias.to(dtype),
        dy=inputs.dy.to(dtype),
    )
    with torch.autocast("cpu", dtype=dtype):
        got = run(mixed_lora_linear, replace(inputs, dy=cast.dy), 0.3)
    expected = run(mixed_lora_linear, cast, 0.3)
    assert got["y"].dtype == dtype
    assert got["dx"].dtype == got["da0"].dtype == torch.float32
    for name, value in got.items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


def test_backward_inside_autocast_of_a_forward_outside() -> None:
    inputs = build(Case(dtype=torch.float32, param_dtype=torch.float32))
    expected = run(mixed_lora_linear, inputs, 0.0)
    y = call(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (dx,) = torch.autograd.grad(y, inputs.x, inputs.dy)
    assert torch.equal(dx, expected["dx"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_replays_the_dropout(reentrant: bool) -> None:
    layer = trained_layer(dropout=0.5)
    x = torch.randn(9, 16, requires_grad=True)

    def gradients(forward: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(3)
        x.grad = None
        layer.zero_grad()
        forward(x).square().sum().backward()
        return [x.grad, layer.individual.a.grad, layer.individual.b.grad, layer.mixer.grad]

    plain = gradients(layer)
    replayed = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    for one, two in zip(plain, replayed, strict=True):
        assert torch.equal(one, two)


def test_deepcopy_is_equal_and_independent() -> None:
    layer = trained_layer()
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), twin(x))
    torch.nn.init.zeros_(twin.individual.b)
    assert not torch.equal(layer(x), twin(x))


GOOD = build(Case(dtype=torch.float32, param_dtype=torch.float32))
FACTORS = GOOD.adapters[0]


def resized(**sizes: tuple[int, ...]) -> list[Adapter]:
    """The good adapters with the second one's a or b of another shape."""
    return [FACTORS, FACTORS._replace(**{name: torch.zeros(size) for name, size in sizes.items()})]


REFUSALS = [
    ({"x": GOOD.x.int()}, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
    ({"x": torch.zeros(())}, "x must be [..., K] and weight [N, K], got [] and [33, 17]"),
    ({"x": torch.zeros(7, 16)}, "x must be [..., K] and weight [N, K], got [7, 16] and [33, 17]"),
    ({"weight": torch.zeros(33)}, "x must be [..., K] and weight [N, K], got [7, 17] and [33]"),
    (
        {"weight": GOOD.weight.double()},
        "weight must have x's dtype torch.float32, got torch.float64",
    ),
    ({"weight": GOOD.weight.to("meta")}, "weight must be on x's device cpu, got meta"),
    (
        {"weight": GOOD.weight.clone().requires_grad_()},
        "weight must be frozen, got requires_grad=True",
    ),
    ({"bias": torch.zeros(7)}, "bias must be [33], got [7]"),
    ({"bias": torch.zeros(33).half()}, "bias must have x's dtype torch.float32, got torch.float16"),
    ({"bias": torch.zeros(33, requires_grad=True)}, "bias must be frozen, got requires_grad=True"),
    ({"adapters": []}, "adapters must be 1 to 8, got 0"),
    ({"adapters": [FACTORS] * 9}, "adapters must be 1 to 8, got 9"),
    (
        {"adapters": resized(a=(3, 16))},
        "adapters[1] must be a [r, 17] and b [33, r] with r >= 1, got [3, 16] and [33, 3]",
    ),
    (
        {"adapters": resized(b=(33, 2))},
        "adapters[1] must be a [r, 17] and b [33, r] with r >= 1, got [3, 17] and [33, 2]",
    ),
    (
        {"adapters": resized(a=(0, 17), b=(33, 0))},
        "adapters[1] must be a [r, 17] and b [33, r] with r >= 1, got [0, 17] and [33, 0]",
    ),
    (
        {"adapters": [FACTORS, FACTORS._replace(a=FACTORS.a.half())]},
        "adapters[1].a must be torch.float32 or torch.float32, got torch.float16",
    ),
    (
        {"adapters": [FACTORS, FACTORS._replace(b=FACTORS.b.to("meta"))]},
        "adapters[1].b must be on x's device cpu, got meta",
    ),
    ({"mixer": torch.zeros(3, 17)}, "mixer must be [2, 17], got [3, 17]"),
    ({"mixer": torch.zeros(2, 17).bfloat16()}, "got torch.bfloat16"),
    ({"mixer": (0.5,)}, "mixer must be 2 finite floats, got (0.5,)"),
    ({"mixer": (0.5, float("nan"))}, "mixer must be 2 finite floats, got (0.5, nan)"),
    ({"scaling": float("inf")}, "scaling must be finite, got inf"),
    ({"dropout_p": 1.0}, "dropout_p must be in [0, 1), got 1.0"),
    ({"dropout_p": -0.1}, "dropout_p must be in [0, 1), got -0.1"),
    ({"dropout_p": float("nan")}, "dropout_p must be in [0, 1), got nan"),
    ({"seed": -1}, "seed must be in [0, 2**63), got -1"),
    ({"seed": 2**63}, "seed must be in [0, 2**63), got 9223372036854775808"),
    (
        {"seed": torch.zeros(1).long()},
        "seed must be an int64 tensor of shape [], got torch.int64 [1]",
    ),
    ({"seed": torch.tensor(1.0)}, "seed must be an int64 tensor of shape [], got torch.float32 []"),
    ({"seed": torch.tensor(-1), "dropout_p": 0.5}, "seed must be in [0, 2**63), got -1"),
    ({"impl": "cuda"}, "impl must be one of auto, torch, triton, reference, got 'cuda'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS, ids=[text for _, text in REFUSALS])
def test_value_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(GOOD, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [1.0]}, "x must be a Tensor, got list"),
        ({"weight": None}, "weight must be a Tensor or a QuantizedWeight, got NoneType"),
        ({"mixer": [0.5, 0.5]}, "mixer must be a Tensor, a tuple of floats or None, got list"),
        ({"seed": 1.5}, "seed must be an int, a Tensor or None, got float"),
        ({"adapters": [FACTORS.a]}, "adapters[0] must be an Adapter(a, b), got Tensor"),
    ],
)
def test_type_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call(GOOD, **changes)

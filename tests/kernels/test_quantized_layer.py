"""Fp8Linear, MixedLoRALinear over a quantized base, and what is refused."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedalt_kernels import Fp8Linear, MixedLoRALinear, QuantizedWeight, choice, mixed_lora_linear

from .cases import Case, build, run
from .quantizing import exact, quantize, triple

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASE = Case(m=20, n=33, k=48, dtype=torch.float32, param_dtype=torch.float32)


def test_fp8_linear_is_near_the_layer_it_came_from() -> None:
    linear = nn.Linear(48, 24)
    linear.weight.data[3] = 0
    fp8 = Fp8Linear.from_linear(linear)
    off = (exact(QuantizedWeight.of(fp8)) - linear.weight.double()).abs()
    scale = fp8.scale.double().unsqueeze(1)
    # Half a unit in the last of three places, or half of the smallest subnormal number.
    assert (off <= torch.maximum(2.0**-4 * 1.001 * linear.weight.abs(), scale * 2.0**-10)).all()
    x = torch.randn(5, 48)
    assert torch.allclose(fp8(x), linear(x), atol=0.1)
    assert not any(parameter.requires_grad for parameter in fp8.parameters())
    assert fp8.weight.nbytes == 24 * 48
    assert repr(fp8) == "Fp8Linear(in_features=48, out_features=24, bias=True)"


def test_fp8_linear_keeps_its_packed_weight_alone() -> None:
    """And gives the bits of the product with the weight written out, forward and backward."""
    torch.manual_seed(0)
    fp8 = Fp8Linear.from_linear(nn.Linear(48, 24))
    weight = QuantizedWeight.of(fp8).dequantize(torch.float32)
    x, dy = torch.randn(2, 5, 48, requires_grad=True), torch.randn(2, 5, 24)
    expected = nn.functional.linear(x, weight, fp8.bias)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fp8(x)
    assert {t.data_ptr() for t in kept} == {fp8.weight.data_ptr(), fp8.scale.data_ptr()}
    assert torch.equal(y, expected)
    gradients = [torch.autograd.grad(each, x, dy)[0] for each in (y, expected)]
    assert torch.equal(*gradients)
    compiled = torch.compile(fp8, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x, dy)[0], gradients[0])


def fp8_layer(**settings: Any) -> MixedLoRALinear:
    torch.manual_seed(0)
    layer = MixedLoRALinear(Fp8Linear.from_linear(nn.Linear(48, 24)), rank=3, **settings)
    for parameter in (layer.individual.b, layer.rest_of_world.a, layer.rest_of_world.b):
        nn.init.normal_(parameter)
    return layer


def test_layer_over_a_quantized_base() -> None:
    layer = fp8_layer(dropout=0.0)
    assert (layer.in_features, layer.out_features) == (48, 24)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"mixer", "individual.a", "individual.b"}
    assert {p.dtype for name, p in layer.named_parameters() if "base" not in name} == {
        torch.float32
    }
    for dtype in DTYPES:  # the bias is float32
        x = torch.randn(2, 5, 48).to(dtype)
        y = layer(x)
        assert (y.shape, y.dtype) == ((2, 5, 24), dtype)
    twin = copy.deepcopy(layer).to("cpu")
    assert torch.equal(twin(x), y)
    assert twin.base.weight.data_ptr() != layer.base.weight.data_ptr()
    blank = MixedLoRALinear(Fp8Linear.from_linear(nn.Linear(48, 24)), rank=3, dropout=0.0)
    blank.load_state_dict(layer.state_dict())
    assert torch.equal(blank(x), y)
    assert layer.to("meta").weight.device.type == "meta"


def test_autocast_computes_in_its_dtype() -> None:
    layer = fp8_layer(dropout=0.0)
    x = torch.randn(5, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x.bfloat16()))


def test_fp8_stays_as_it_is_stored_whatever_the_model_is_cast_to() -> None:
    layer = fp8_layer(dropout=0.0)
    weight, scale = layer.base.weight.clone(), layer.base.scale.clone()
    layer.bfloat16()
    assert torch.equal(layer.base.weight.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(layer.base.scale, scale)
    assert layer.base.bias.dtype == torch.bfloat16
    assert layer(torch.randn(3, 48, dtype=torch.bfloat16)).isfinite().all()


def test_numbers_too_small_for_a_scale_become_zeros() -> None:
    linear = nn.Linear(4, 2, bias=False)
    nn.init.constant_(linear.weight, 1e-44)
    assert torch.equal(Fp8Linear.from_linear(linear)(torch.ones(1, 4)), torch.zeros(1, 2))


def test_a_rank_can_be_set_over_a_quantized_base() -> None:
    layer = MixedLoRALinear(Fp8Linear.from_linear(nn.Linear(48, 24)), rest_of_world=False)
    layer.set_rank(5)
    assert layer.individual.a.shape == (5, 48)


GOOD, _, _ = triple(build(CASE), "nested nf4")
NF4 = GOOD.weight
INT8 = quantize(build(CASE).weight, "int8")


def with_tensor(weight: QuantizedWeight, place: int, tensor: Tensor) -> QuantizedWeight:
    tensors = list(weight.tensors)
    tensors[place] = tensor
    return weight._replace(tensors=tuple(tensors))


REFUSALS = [
    (NF4._replace(kind="nf3"), "weight.kind must be one of nf4, fp4, int8, fp8, got 'nf3'"),
    (
        NF4._replace(blocks=()),
        "weight.blocks must be (block,) or (block, nested_block) for nf4, got ()",
    ),
    (INT8._replace(blocks=(64,)), "weight.blocks must be () for int8, got (64,)"),
    (NF4._replace(blocks=(48, 4)), "weight.blocks must be powers of two from 2 on, got (48, 4)"),
    (NF4._replace(blocks=(16,)), "weight.tensors must be 3 for nf4, got 6"),
    (NF4._replace(shape=(33, 40)), "x must be [..., K] and weight [N, K], got [20, 48] and"),
    (
        with_tensor(NF4, 0, NF4.tensors[0][1:]),
        "weight.tensors[0] must be contiguous [792] for nf4, got [791]",
    ),
    (
        with_tensor(INT8, 1, INT8.tensors[1][:, None]),
        "weight.tensors[1] must be contiguous [33] for int8, got [33, 1]",
    ),
    (
        with_tensor(INT8, 1, INT8.tensors[1].half()),
        "weight.tensors[1] must have int8's dtype torch.float32, got torch.float16",
    ),
    (
        with_tensor(INT8, 0, INT8.tensors[0].to("meta")),
        "weight.tensors[0] must be on x's device cpu, got meta",
    ),
    (
        with_tensor(INT8, 1, INT8.tensors[1].clone().requires_grad_()),
        "weight.tensors[1] must be frozen, got requires_grad=True",
    ),
]


@pytest.mark.parametrize(("weight", "message"), REFUSALS, ids=[text for _, text in REFUSALS])
def test_refusals(weight: QuantizedWeight, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(mixed_lora_linear, replace(GOOD, weight=weight), 0.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: QuantizedWeight.of(nn.Linear(4, 4)), TypeError, "or an Fp8Linear, got Linear"),
        (
            lambda: MixedLoRALinear(nn.Conv1d(4, 4, 1)),
            TypeError,
            "bitsandbytes Linear4bit or Linear8bitLt, or an Fp8Linear, got Conv1d",
        ),
        (
            lambda: MixedLoRALinear(Fp8Linear(torch.ones(4, 4).half(), torch.ones(4), None)),
            ValueError,
            "weight.tensors[0] must have fp8's dtype torch.float8_e4m3fn, got torch.float16",
        ),
        (
            lambda: Fp8Linear.from_linear(nn.Identity()),
            TypeError,
            "linear must be an nn.Linear of floats, got Identity",
        ),
    ],
)
def test_refused_modules(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_fp8_of_what_is_not_finite_is_refused() -> None:
    linear = nn.Linear(4, 4)
    linear.weight.data[1, 2] = float("inf")
    with pytest.raises(ValueError, match=r"linear\.weight must be finite"):
        Fp8Linear.from_linear(linear)


def test_fp8_is_refused_on_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, refused in (((8, 0), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, own=capability: own)
        reason = choice._without_fp8(torch.device("cuda"))
        assert (reason is not None) == refused
    monkeypatch.setattr(choice, "_without_fp8", lambda device: "it is old")
    with pytest.raises(RuntimeError, match="an fp8 weight cannot be used here: it is old"):
        fp8_layer()(torch.randn(3, 48))

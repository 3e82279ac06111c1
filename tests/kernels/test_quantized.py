"""Quantized base weights: their values, the layer's error budget over them, memory, refusals."""

import copy
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedalt_kernels import Fp8Linear, MixedLoRALinear, QuantizedWeight, choice, mixed_lora_linear
from fedalt_kernels import quantized as storage_module
from fedalt_kernels.reference import reference

from .budget import assert_within_budget
from .cases import SCALING, Case, Inputs, build, run
from .quantizing import STORAGES, check, exact, quantize, triple

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(33, 17), (24, 48), (5, 64), (1, 1), (3, 130)]  # odd; rows of whole blocks; short
CASE = Case(m=20, n=33, k=48, ranks=(3, 5), frozen=(1,), param_dtype=torch.float32)


def weights(n: int = 24, k: int = 48) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_values_are_those_of_the_storage(storage: str, shape: tuple[int, int]) -> None:
    """In float64 exactly; in float32 to its roundings; otherwise that, rounded once."""
    weight = quantize(weights(*shape), storage)
    truth = exact(weight)
    assert torch.equal(weight.dequantize(torch.float64), truth)
    single = weight.dequantize(torch.float32)
    assert ((single - truth).abs() <= 4 * 2.0**-24 * truth.abs().max()).all()
    for dtype in DTYPES[1:]:
        assert torch.equal(weight.dequantize(dtype), single.to(dtype))


def test_values_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "PIECE_ELEMENTS", 100)
    for storage in STORAGES:
        weight = quantize(weights(33, 17), storage)
        assert torch.equal(weight.dequantize(torch.float64), exact(weight)), storage


def test_fp4_is_a_code_like_any_other() -> None:
    nf4 = quantize(weights(), "nf4")
    octets, absmax, _ = nf4.tensors
    code = torch.randperm(16).float() / 12
    fp4 = QuantizedWeight("fp4", nf4.shape, (octets, absmax, code), nf4.blocks)
    assert torch.equal(fp4.dequantize(torch.float64), exact(fp4))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "case",
    [
        replace(CASE, m=8, n=33, k=17),
        replace(CASE, m=20, n=33, k=48, dropout=0.3),
        replace(CASE, m=40, n=64, k=130),
    ],
    ids=lambda case: f"{case.m} {case.n} {case.k}",
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_error_budget(storage: str, dtype: torch.dtype, case: Case) -> None:
    check(replace(case, dtype=dtype), storage, mixed_lora_linear, draws=8)


@pytest.mark.parametrize("storage", STORAGES)
def test_double_precision_is_kept(storage: str) -> None:
    case = replace(CASE, dtype=torch.float64, param_dtype=torch.float64)
    quantized, _, wide = triple(build(case), storage)
    truth = run(reference, wide, 0.0)
    for impl in ("torch", "reference"):
        got = run(partial(mixed_lora_linear, impl=impl), quantized, 0.0)
        for name, value in got.items():
            assert torch.allclose(value, truth[name], rtol=1e-12, atol=1e-12), (impl, name)


def test_a_weight_of_wrong_blocks_is_noticed() -> None:
    """The budget sees statistics that are off by one block."""
    inputs = build(replace(CASE, dtype=torch.bfloat16))
    quantized, dense, wide = triple(inputs, "nf4")
    octets, absmax, code = quantized.weight.tensors
    shifted = quantized.weight._replace(tensors=(octets, absmax.roll(1), code))
    results = [
        run(mixed_lora_linear, replace(quantized, weight=shifted), 0.0),
        run(reference, dense, 0.0),
        run(reference, wide, 0.0),
    ]
    with pytest.raises(AssertionError, match="times its budget"):
        assert_within_budget(*results, length=48)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_packed_tensors_are_saved(storage: str, dropout: float) -> None:
    case = replace(CASE, m=64, dtype=torch.bfloat16)
    inputs, _, _ = triple(build(case), storage)
    tensors = [*inputs.tensors().values(), *inputs.weight.tensors, inputs.bias]
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held = tensor.untyped_storage()
        if held.data_ptr() not in known:
            saved[held.data_ptr()] = held.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(mixed_lora_linear, inputs, dropout)
    assert sum(saved.values()) == case.m * (2 * sum(case.ranks) + 4 * 2) + 8 * (dropout > 0)


@pytest.fixture
def workspace(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, Tensor]:
    """What the threads hold, from nothing on."""
    monkeypatch.setattr(storage_module, "_held", storage_module._Held())
    return storage_module._held.by_dtype


def test_layers_share_one_workspace(workspace: dict[torch.dtype, Tensor]) -> None:
    large, small = (
        triple(build(replace(CASE, n=n, dtype=torch.float32)), "nf4")[0] for n in (64, 33)
    )
    expected = [run(mixed_lora_linear, inputs, 0.0) for inputs in (large, small)]
    (held,) = workspace.values()
    assert held.numel() == 64 * 48
    for inputs, before in zip((large, small), expected, strict=True):
        held.fill_(float("nan"))
        after = run(mixed_lora_linear, inputs, 0.0)
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert workspace[torch.float32].data_ptr() == held.data_ptr()


def test_a_workspace_of_inference_mode_serves_training(
    workspace: dict[torch.dtype, Tensor],
) -> None:
    inputs, _, _ = triple(build(replace(CASE, dtype=torch.float32)), "int8")
    with torch.inference_mode():
        y = mixed_lora_linear(*arguments(inputs), scaling=SCALING)
    assert torch.equal(y, run(mixed_lora_linear, inputs, 0.0)["y"])
    assert len(workspace) == 1


def arguments(inputs: Inputs) -> tuple[Any, ...]:
    return inputs.x, inputs.weight, inputs.bias, inputs.adapters, inputs.mixer


def test_threads_do_not_share_a_workspace() -> None:
    cases = [replace(CASE, dtype=torch.float32, n=200, k=200, m=2)] * 4
    each = [triple(build(case, seed), "nf4")[0] for seed, case in enumerate(cases)]
    expected = [run(mixed_lora_linear, inputs, 0.0)["y"] for inputs in each]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(run(mixed_lora_linear, each[i], 0.0)["y"], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


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


def test_shared_input_over_quantized_bases() -> None:
    layers = [fp8_layer(dropout=0.0) for _ in range(2)]
    x = torch.randn(3, 48)
    expected = [layer(x) for layer in layers]
    MixedLoRALinear.share_input(layers)
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))


def test_a_rank_can_be_set_over_a_quantized_base() -> None:
    layer = MixedLoRALinear(Fp8Linear.from_linear(nn.Linear(48, 24)), rest_of_world=False)
    layer.set_rank(5)
    assert layer.individual.a.shape == (5, 48)


GOOD, _, _ = triple(build(replace(CASE, dtype=torch.float32)), "nested nf4")
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
    (NF4._replace(blocks=(48, 4)), "weight.blocks must be powers of two, got (48, 4)"),
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
            lambda: MixedLoRALinear(Fp8Linear.from_linear(nn.Linear(4, 4)).half()),
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

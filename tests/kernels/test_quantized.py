"""Quantized base weights: their values, the layer's error budget over them, and memory."""

import threading
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fedalt_kernels import QuantizedWeight, mixed_lora_linear
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


def test_fake_memory_does_not_outlive_its_mode() -> None:
    weight = quantize(build(CASE).weight, "nested nf4")
    expected = storage_module.dense(weight, torch.float32).clone()
    with FakeTensorMode(allow_non_fake_inputs=True):
        storage_module.dense(weight, torch.float32)
    assert torch.equal(storage_module.dense(weight, torch.float32), expected)

"""bitsandbytes' own layers as a base, as they are."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedalt_kernels import MixedLoRALinear, QuantizedWeight

from .quantizing import exact
from .test_compile import step

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

K, N = 128, 96
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOUR_BITS = list(itertools.product(["nf4", "fp4"], [False, True]))


def linear4bit(k: int = K, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return bitsandbytes.nn.Linear4bit(k, N, **settings).to(DEVICE)


def linear8bit() -> nn.Module:
    torch.manual_seed(0)
    return bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False).to(DEVICE)


def dequantized(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """By bitsandbytes, as one long row: its AVX-512 code takes every row to begin a new block,
    which is wrong where a block crosses rows."""
    state = copy.deepcopy(layer.weight.quant_state)
    n, k = state.shape
    state.shape, state.dtype = torch.Size((1, n * k)), dtype
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, state).view(n, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [K, 70])
@pytest.mark.parametrize(("kind", "nested"), FOUR_BITS)
def test_4_bits_are_those_of_bitsandbytes(
    kind: str, nested: bool, k: int, dtype: torch.dtype
) -> None:
    """Bit for bit."""
    layer = linear4bit(k, quant_type=kind, compress_statistics=nested)
    weight = QuantizedWeight.of(layer)
    assert (weight.kind, weight.shape, len(weight.blocks)) == (kind, (N, k), 1 + nested)
    assert torch.equal(weight.dequantize(dtype), dequantized(layer, dtype))
    assert torch.equal(weight.dequantize(torch.float64), exact(weight))


def test_a_block_that_crosses_rows_is_as_it_was_quantized() -> None:
    """Within half a step of the code of the values that went in."""
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(96, 64, quant_type="nf4", compress_statistics=False)
    before = layer.weight.detach().clone()
    weight = QuantizedWeight.of(layer.to("cpu"))
    _, absmax, code = weight.tensors
    steps = absmax.repeat_interleave(64).view(64, 96) * code.diff().max() / 2
    assert ((weight.dequantize(torch.float32) - before).abs() <= steps * 1.0001).all()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_may_be_stored_in_any_dtype(storage: torch.dtype) -> None:
    plain, other = linear4bit(), linear4bit(quant_storage=storage)
    one, two = (QuantizedWeight.of(layer).dequantize(torch.float32) for layer in (plain, other))
    assert torch.equal(one, two)


def test_8_bits_are_rows_over_127_before_and_after_a_forward() -> None:
    layer = linear8bit()
    expected = layer.weight.CB * layer.weight.SCB.unsqueeze(1) / 127
    assert torch.equal(QuantizedWeight.of(layer).dequantize(torch.float32), expected)
    layer(torch.randn(3, K, device=DEVICE))
    assert layer.weight.SCB is None
    assert torch.equal(QuantizedWeight.of(layer).dequantize(torch.float32), expected)


BASES = {
    "nf4": lambda: linear4bit(quant_type="nf4"),
    "odd fp4": lambda: linear4bit(70, quant_type="fp4", bias=False),
    "int8": linear8bit,
}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", BASES)
def test_the_layer_takes_it_as_it_is(name: str, impl: str) -> None:
    layer = MixedLoRALinear(BASES[name](), rank=4, dropout=0.0, impl=impl)
    held = layer.base.weight.data_ptr()
    assert layer.weight.tensors[0].data_ptr() == held
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"mixer", "individual.a", "individual.b"}
    x = torch.randn(3, layer.in_features, device=DEVICE)
    weight = layer.weight.dequantize(torch.float32)
    assert torch.allclose(layer(x), nn.functional.linear(x, weight, layer.bias), atol=1e-5)
    for parameter in (layer.individual.b, layer.rest_of_world.a, layer.rest_of_world.b):
        nn.init.normal_(parameter)
    twin = copy.deepcopy(layer).to(DEVICE)
    assert torch.equal(twin(x), layer(x))
    assert twin.base.weight.data_ptr() != held


@pytest.mark.parametrize("name", BASES)
def test_the_layer_compiles_in_one_graph(name: str) -> None:
    layer = MixedLoRALinear(BASES[name](), rank=4, dropout=0.0)
    nn.init.normal_(layer.individual.b)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, layer.in_features, device=DEVICE)
    for eager, other in zip(step(layer, x), step(compiled, x), strict=True):
        assert torch.allclose(eager, other, rtol=1e-5, atol=1e-5)


def test_not_quantized_yet() -> None:
    for layer in (
        bitsandbytes.nn.Linear4bit(4, 4),
        bitsandbytes.nn.Linear8bitLt(4, 4, has_fp16_weights=False),
    ):
        name = type(layer).__name__
        with pytest.raises(TypeError, match=f"this {name} is not quantized yet: move it to its"):
            MixedLoRALinear(layer)


def test_repacked_for_a_cpu_is_refused() -> None:
    layer = linear4bit()
    layer.weight.quant_state.packing_format_for_cpu = True  # as some CPUs do in eval mode
    with pytest.raises(ValueError, match="bitsandbytes has repacked this weight for its own"):
        MixedLoRALinear(layer)

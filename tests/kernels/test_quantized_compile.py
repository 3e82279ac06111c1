"""Quantized base weights under torch.compile."""

import pytest
import torch
from torch import Tensor, library, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fedalt_kernels import Fp8Linear, MixedLoRALinear
from fedalt_kernels import operators as _registers_them  # noqa: F401

from .cases import Case, build
from .quantizing import quantize
from .test_compile import DEVICE, branches, step

CASE = Case(m=5, n=24, k=48, dtype=torch.float32, param_dtype=torch.float32)


@pytest.mark.parametrize(("name", "storage"), [("merged", "nested nf4"), ("fused", "int8")])
def test_opcheck(name: str, storage: str) -> None:
    inputs = build(CASE, 0, DEVICE)
    shared = branches(CASE, dropout=False)
    packed = tuple(quantize(inputs.weight, storage))
    operators = torch.ops.fedalt_kernels
    forward_operator = getattr(operators, f"{name}_forward")
    backward_operator = getattr(operators, f"{name}_backward")
    forward = (inputs.x.detach(), None, inputs.bias, *shared, *packed)
    library.opcheck(forward_operator.default, forward)
    _, low, gates = forward_operator(*forward)
    backward = (inputs.dy, inputs.x.detach(), None, low, gates, *shared, [True] * 6, *packed)
    library.opcheck(backward_operator.default, backward)


def layer_over_fp8(impl: str) -> MixedLoRALinear:
    base = Fp8Linear.from_linear(nn.Linear(48, 24))
    layer = MixedLoRALinear(base, rank=4, dropout=0.5, impl=impl).to(DEVICE)
    nn.init.normal_(layer.individual.b)
    return layer


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiled_layer_matches_eager_at_every_length(impl: str) -> None:
    layer = layer_over_fp8(impl)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for rows in (5, 8, 13):
        x = torch.randn(2, rows, 48, device=DEVICE)
        for eager, other in zip(step(layer, x), step(compiled, x), strict=True):
            assert torch.allclose(eager, other, rtol=1e-5, atol=1e-5)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


def test_a_compiled_layer_saves_no_dequantized_weight() -> None:
    layer = layer_over_fp8("torch")
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append((tensor.dtype, tensor.numel()))
        return tensor

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = compiled(torch.randn(3, 48, device=DEVICE, requires_grad=True))
    assert (torch.float8_e4m3fn, 24 * 48) in sizes
    assert max(count for dtype, count in sizes if dtype == torch.float32) < 24 * 48
    y.sum().backward()

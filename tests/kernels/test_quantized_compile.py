"""Quantized base weights under torch.compile."""

import pytest
import torch
from torch import Tensor, library, nn

from fedalt_kernels import Fp8Linear, MixedLoRALinear

from .cases import Case, build
from .quantizing import quantize
from .test_compile import DEVICE, branches, check_lengths

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
    check_lengths(layer_over_fp8(impl))


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

"""The operators for many clients, and their layer under torch.compile."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend

from fedalt_kernels import Fp8Linear, GroupedMixedLoRALinear, Segments

from .cases import SCALING, Case
from .test_grouped import many

CLIENTS = [1, 2, 1, 1, 0, 2, 1]
IMPLEMENTATIONS = {"torch": "grouped", "triton": "grouped_fused"}


@pytest.mark.parametrize("name", IMPLEMENTATIONS.values())
@pytest.mark.parametrize(("gate", "dropout"), [("softmax", True), ("fixed", False)])
def test_opcheck(gate: str, dropout: bool, name: str) -> None:
    case = Case(ranks=(1, 2, 3), gate=gate, dtype=torch.float32, param_dtype=torch.float32)
    inputs = many(case, 3)
    mixer = inputs.mixer
    learned = isinstance(mixer, Tensor)
    x, segments = inputs.x.detach(), Segments.of(CLIENTS, 3)
    shared = (
        [a.detach() for a, _ in inputs.adapters],
        [b.detach() for _, b in inputs.adapters],
        mixer.detach() if isinstance(mixer, Tensor) else None,
        None if learned else mixer,
        SCALING,
        77 if dropout else 0,
        torch.tensor([4, 5, 6]) if dropout else None,
        None,
        *segments,
    )
    forward = (x, inputs.weight, inputs.bias, *shared)
    operators = torch.ops.fedalt_kernels
    forward_operator = getattr(operators, f"{name}_forward")
    library.opcheck(forward_operator.default, forward)
    _, low, gates = forward_operator(*forward)
    for needs_x in (True, False):
        needs = [needs_x, learned, True, False, True, True, True, False]
        backward = (inputs.dy, x, inputs.weight, low, gates, *shared, needs)
        library.opcheck(getattr(operators, f"{name}_backward").default, backward)


def layer_of(base: torch.nn.Module, impl: str, dropout: float = 0.5) -> GroupedMixedLoRALinear:
    layer = GroupedMixedLoRALinear(base, 3, rank=4, dropout=dropout, impl=impl)
    for tensor in (layer.individual.b, layer.rest_of_world.a, layer.rest_of_world.b):
        torch.nn.init.normal_(tensor)
    return layer


def step(
    layer: GroupedMixedLoRALinear, call: Callable[..., Tensor], x: Tensor, clients: object
) -> list[Tensor]:
    """The output and the gradients of x and of the layer's trainable parameters."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    y = call(x, clients)
    trainable = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trainable])]


def check(layer: GroupedMixedLoRALinear, call: Callable[..., Tensor], clients: object) -> None:
    rows = len(clients) if isinstance(clients, list) else sum(clients.sizes)
    x = torch.randn(rows, 1, layer.in_features)
    pairs = step(layer, layer, x, clients), step(layer, call, x, clients)
    for eager, other in zip(*pairs, strict=True):
        assert torch.allclose(eager, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("impl", "dropout"), [("torch", 0.0), ("torch", 0.5), ("triton", 0.5)])
def test_one_graph_serves_every_share_of_a_batch(impl: str, dropout: float) -> None:
    torch.compiler.reset()
    layer = layer_of(torch.nn.Linear(16, 12), impl, dropout)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for clients in ([1, 2, 1, 0, 0, 2], [1, 2, 2, 0, 2, 0, 1, 0, 1], [2, 2, 2, 2, 1, 0, 1, 0]):
        check(layer, compiled, Segments.of(clients, 3))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


@pytest.mark.parametrize("clients", [[0, 0, 2], [2, 0, 2], Segments.of([0, 0, 2], 3)], ids=str)
def test_lists_and_sorted_rows_compile_in_one_graph(clients: object) -> None:
    torch.compiler.reset()
    layer = layer_of(Fp8Linear.from_linear(torch.nn.Linear(32, 24)), "torch")
    check(layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), clients)


def test_inductor_compiles_forward_and_backward_with_dropout() -> None:
    layer = layer_of(torch.nn.Linear(32, 24), "torch")
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(6, 32, requires_grad=True)
    compiled(x, Segments.of([0, 2, 2, 0, 0, 2], 3)).sum().backward()
    grad = layer.individual.b.grad
    assert grad[[0, 2]].any((1, 2)).all()
    assert not grad[1].any()
    assert torch.isfinite(x.grad).all()

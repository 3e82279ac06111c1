"""The registered operators, and the layer under torch.compile."""

import pytest
import torch
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend

from fedalt_kernels import MixedLoRALinear

from .cases import SCALING, SEED, Case, build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def branches(case: Case, dropout: bool) -> tuple[object, ...]:
    """The arguments that both operators share."""
    inputs = build(case, 0, DEVICE)
    learned = isinstance(inputs.mixer, torch.Tensor)
    return (
        [a.detach() for a, _ in inputs.adapters],
        [b.detach() for _, b in inputs.adapters],
        inputs.mixer.detach() if learned else None,
        None if learned else inputs.mixer,
        SCALING,
        77 if dropout else 0,
        torch.tensor(SEED, device=DEVICE) if dropout else None,
        None,
    )


@pytest.mark.parametrize("name", ["merged", "fused"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=torch.bfloat16, param_dtype=torch.float32),
        Case(ranks=(1, 2, 3), dtype=torch.float32, param_dtype=torch.float32),
        Case(gate="fixed", dtype=torch.float32, param_dtype=torch.float32),
    ],
    ids=str,
)
def test_opcheck(case: Case, dropout: bool, name: str) -> None:
    inputs = build(case, 0, DEVICE)
    shared = branches(case, dropout)
    x, dy = inputs.x.detach(), inputs.dy
    operators = torch.ops.fedalt_kernels
    forward_operator = getattr(operators, f"{name}_forward")
    backward_operator = getattr(operators, f"{name}_backward")
    forward = (x, inputs.weight, inputs.bias, *shared)
    library.opcheck(forward_operator.default, forward)
    _, low, gates = forward_operator(*forward)
    learned = isinstance(inputs.mixer, torch.Tensor)
    count = len(case.ranks)
    for needs_x in (True, False):
        needs = [needs_x, learned] + [True] * count + [False] + [True] * (count - 1)
        backward = (dy, x, inputs.weight, low, gates, *shared, needs)
        library.opcheck(backward_operator.default, backward)


def step(layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x and of the layer's trainable parameters."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    trainable = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.sum(), [x, *trainable])]


def check_lengths(layer: MixedLoRALinear) -> None:
    """Compiled as eager at several lengths, without a compilation for each."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for rows in (5, 8, 13):
        x = torch.randn(2, rows, layer.in_features, device=DEVICE)
        for eager, other in zip(step(layer, x), step(compiled, x), strict=True):
            assert torch.allclose(eager, other, rtol=1e-5, atol=1e-5)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiled_layer_matches_eager_at_every_length(dropout: float, impl: str) -> None:
    layer = MixedLoRALinear(torch.nn.Linear(32, 24), rank=4, dropout=dropout, impl=impl)
    layer.to(DEVICE)
    for parameter in (layer.individual.b, layer.rest_of_world.a, layer.rest_of_world.b):
        torch.nn.init.normal_(parameter)
    check_lengths(layer)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_inductor_compiles_forward_and_backward_with_dropout(impl: str) -> None:
    layer = MixedLoRALinear(torch.nn.Linear(32, 24), rank=4, dropout=0.5, impl=impl)
    layer.to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(6, 32, device=DEVICE, requires_grad=True)
    compiled(x).sum().backward()
    assert layer.individual.b.grad.any()
    assert torch.isfinite(x.grad).all()


class Attention(torch.nn.Module):
    """Three layers that share their pass over x."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        layers = [
            MixedLoRALinear(torch.nn.Linear(32, n), rank=4, dropout=0.5, impl=impl)
            for n in (32, 16, 16)
        ]
        self.layers = torch.nn.ModuleList(layers)
        MixedLoRALinear.share_input(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_layers_that_share_their_input_compile_in_one_graph(impl: str) -> None:
    model = Attention(impl).to(DEVICE)
    for layer in model.layers:
        torch.nn.init.normal_(layer.individual.b)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(70, 32, device=DEVICE)
    for eager, other in zip(step(model, x), step(compiled, x), strict=True):
        assert torch.allclose(eager, other, rtol=1e-5, atol=1e-5)

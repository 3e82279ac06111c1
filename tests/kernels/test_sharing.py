"""Layers that read one x: one launch for all of them, and the same results bit for bit."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedalt_kernels import Fp8Linear, MixedLoRALinear, fused, fused_forward, sharing
from fedalt_kernels.triton import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K, OUTPUTS = 64, (64, 32, 32)
ROWS = 70  # more than decode serves


def make_layers(dropout: float, **settings: object) -> list[MixedLoRALinear]:
    torch.manual_seed(0)
    layers = [
        MixedLoRALinear(nn.Linear(K, n), 4, dropout=dropout, impl="triton", **settings).to(DEVICE)
        for n in OUTPUTS
    ]
    for layer in layers:
        for adapter in layer.adapters:
            nn.init.normal_(adapter.a)
            nn.init.normal_(adapter.b)
    return layers


def results(layers: list[MixedLoRALinear], x: Tensor) -> list[Tensor]:
    """Outputs and gradients of all layers, from one seed."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    ys = [layer(x) for layer in layers]
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *trained])
    return [y.detach() for y in ys] + list(grads)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each pass over x has served."""
    seen: list[int] = []
    projecting = fused_forward.projecting

    def counted(x: Tensor, layers: int, *rest: object) -> Callable[..., object]:
        project = projecting(x, layers, *rest)
        return lambda *tensors: seen.append(layers) or project(*tensors)

    monkeypatch.setattr(fused_forward, "projecting", counted)
    monkeypatch.setattr(tiles, "forward_schedule", lambda *_: "split")
    return seen


def test_layers_over_quantized_bases_share(passes: list[int]) -> None:
    torch.manual_seed(0)
    layers = []
    for n in OUTPUTS[:2]:
        base = Fp8Linear.from_linear(nn.Linear(K, n)).to(DEVICE)
        layers.append(MixedLoRALinear(base, 4, dropout=0.0, impl="triton"))
        nn.init.normal_(layers[-1].individual.b)
    x = torch.randn(ROWS, K, device=DEVICE)
    expected = [layer(x) for layer in layers]
    MixedLoRALinear.share_input(layers)
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
    assert passes == [1, 1, 2]


@pytest.mark.parametrize("settings", [{}, {"mixer": (0.25, 0.75)}], ids=["mixer", "fixed gates"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_pass_and_the_same_bits(
    dropout: float, settings: dict[str, object], passes: list[int]
) -> None:
    layers = make_layers(dropout, **settings)
    x = torch.randn(2, ROWS // 2, K, device=DEVICE)
    alone = results(layers, x)
    assert passes == [1, 1, 1]
    passes.clear()
    MixedLoRALinear.share_input(layers)
    together = results(layers, x)
    assert passes == [3]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_a_transposed_x_is_read_as_it_is(passes: list[int]) -> None:
    layers = make_layers(0.0)
    x = torch.randn(K, ROWS, device=DEVICE).t()
    alone = [layer(x) for layer in layers]
    passes.clear()
    MixedLoRALinear.share_input(layers)
    for layer, y in zip(layers, alone, strict=True):
        assert torch.equal(layer(x), y)
    assert passes == [3]


def test_a_changed_x_or_parameter_is_not_taken_for_the_old(passes: list[int]) -> None:
    layers = make_layers(0.0)
    MixedLoRALinear.share_input(layers)
    x = torch.randn(ROWS, K, device=DEVICE)
    with torch.no_grad():
        for layer in layers:
            layer(x)
        layers[0](x)
        layers[1].individual.a.add_(1)
        fresh = layers[1](x)
        assert torch.equal(fresh, copy.deepcopy(layers[1])(x.clone()))
        layers[2](x)
        x.add_(1)
        assert torch.equal(layers[0](x), copy.deepcopy(layers[0])(x.clone()))
    assert passes.count(3) >= 3


def test_layers_that_read_different_tensors_are_released(passes: list[int]) -> None:
    layers = make_layers(0.0)
    MixedLoRALinear.share_input(layers)
    one, other = torch.randn(2, ROWS, K, device=DEVICE)
    layers[0](one)
    layers[1](other)
    assert passes == [3, 1]
    assert all(layer.shared is None for layer in layers)


def test_layers_of_other_dtypes_or_scales_serve_themselves(passes: list[int]) -> None:
    layers = make_layers(0.0)
    x = torch.randn(ROWS, K, device=DEVICE)
    MixedLoRALinear.share_input(layers)
    layers[0](x)
    assert passes == [3]
    layers[1].scaling *= 2
    MixedLoRALinear.share_input(layers)
    layers[0](x)
    layers[1].scaling /= 2
    layers[2].mixer.data = layers[2].mixer.data.bfloat16()
    x = x.bfloat16()
    for layer in layers:
        layer.base.bfloat16()
    MixedLoRALinear.share_input(layers)
    layers[0](x)
    assert passes == [3, 1, 1]


def test_a_groups_plan_holds_no_tensor_of_the_call_that_made_it(passes: list[int]) -> None:
    layers = make_layers(0.3)
    MixedLoRALinear.share_input(layers)
    x = torch.randn(ROWS, K, device=DEVICE)
    layers[0](x)
    held = [weakref.ref(each) for each in (x, *(p for layer in layers for p in layer.parameters()))]
    assert sharing._plans
    del layers, x
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_few_rows_and_lone_wide_layers_keep_their_own_schedule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "programs", lambda device: 1)
    few, many = torch.empty(8, 64), torch.empty(128, 64)
    many, few = many.to(DEVICE, torch.bfloat16), few.to(DEVICE, torch.bfloat16)
    wide, narrow = (torch.empty(n, 64, dtype=torch.bfloat16, device=DEVICE) for n in (64, 32))
    assert not fused.worth_sharing(few, [wide, narrow], [4, 4], False)
    assert fused.worth_sharing(many, [wide, narrow], [4, 4], False)
    if tiles.architecture(many.device) in tiles.DESCRIBES:
        assert not fused.worth_sharing(many, [wide, wide], [4, 4], False)


def test_sharing_survives_copying_and_pickling(passes: list[int]) -> None:
    model = nn.ModuleList(make_layers(0.0))
    MixedLoRALinear.share_input(list(model))
    x = torch.randn(ROWS, K, device=DEVICE)
    expected = [layer(x) for layer in model]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].shared is other[2].shared is not model[0].shared
        assert [*other[0].shared.layers] == [*other]
        passes.clear()
        for layer, y in zip(other, expected, strict=True):
            assert torch.equal(layer(x), y)
        assert passes == [3]

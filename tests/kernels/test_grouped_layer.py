"""The module for many clients, against each client's own module on the same base."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fedalt_kernels import GroupedMixedLoRALinear, MixedLoRALinear, Segments

pytestmark = pytest.mark.usefixtures("poison")


def layers(
    seed: int = 0, **settings: object
) -> tuple[GroupedMixedLoRALinear, list[MixedLoRALinear]]:
    """A layer of three clients, and the three alone, on one base."""
    torch.manual_seed(seed)
    base = torch.nn.Linear(24, 20)
    alone = [MixedLoRALinear(base, 3, 6, **settings) for _ in range(3)]
    layer = GroupedMixedLoRALinear(base, 3, 3, 6, **settings)
    with torch.no_grad():
        for client, own in enumerate(alone):
            for name, tensor in own.named_parameters():
                if not name.startswith("base."):
                    tensor.normal_()
                    layer.get_parameter(name)[client].copy_(tensor)
    return layer, alone


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixer": "scalar"},
        {"mixer": (0.25, 0.75)},
        {"mixer": None},
        {"rest_of_world": False},
    ],
    ids=str,
)
def test_the_module_is_the_clients_own_modules(settings: dict[str, object]) -> None:
    layer, alone = layers(dropout=0.0, **settings)
    layer, alone = layer.double(), [own.double() for own in alone]
    x = torch.randn(6, 5, 24, dtype=torch.float64)
    clients = [2, 0, 0, 2, 1, 0]
    y = layer(x, clients)
    want = torch.stack([alone[c](row) for c, row in zip(clients, x, strict=True)])
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    want.square().sum().backward()
    for name, tensor in layer.named_parameters():
        own = [each.get_parameter(name).grad for each in alone]
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, torch.stack(own), rtol=1e-10, atol=1e-10)
        else:
            assert tensor.grad is None


def test_the_module_starts_clients_as_their_own_modules() -> None:
    layer, alone = layers()
    layer.reset_parameters([torch.Generator().manual_seed(seed) for seed in range(3)])
    for client, own in enumerate(alone):
        own.reset_parameters(torch.Generator().manual_seed(client))
        for name, tensor in own.named_parameters():
            if not name.startswith("base."):
                assert torch.equal(layer.get_parameter(name)[client], tensor)


def test_checkpointing_draws_the_same_masks() -> None:
    layer, _ = layers(dropout=0.5)
    x, clients = torch.randn(4, 24, requires_grad=True), [0, 2, 1, 2]
    found = []
    for kept in (True, False):
        torch.manual_seed(3)
        y = layer(x, clients) if kept else checkpoint(layer, x, clients, use_reentrant=False)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_seeds_are_drawn_anew_and_by_the_generator() -> None:
    layer, _ = layers(dropout=0.5)
    x, clients = torch.randn(4, 24), [0, 2, 1, 2]
    torch.manual_seed(3)
    first, second = layer(x, clients), layer(x, clients)
    torch.manual_seed(3)
    assert torch.equal(layer(x, clients), first)
    assert not torch.equal(first, second)
    assert torch.equal(layer(x, clients, [1, 2, 3]), layer(x, clients, [1, 2, 3]))
    layer.eval()
    assert torch.equal(layer(x, clients), layer(x, clients, [1, 2, 3]))


def test_transforms_and_the_meta_device_take_the_specification() -> None:
    layer, _ = layers(dropout=0.0)
    x, clients = torch.randn(4, 24), Segments.of([0, 2, 1, 2], 3)
    _, tangent = torch.func.jvp(lambda x: layer(x, clients), (x,), (torch.ones_like(x),))
    step = (layer(x + 1e-3, clients) - layer(x - 1e-3, clients)) / 2e-3
    torch.testing.assert_close(tangent, step, rtol=1e-2, atol=1e-2)
    assert layer.to("meta")(x.to("meta"), clients).shape == (4, 20)
    again, _ = layers(dropout=0.0)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(again(x, clients).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_refusals_name_the_argument() -> None:
    base = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="clients must be an integer of at least 1, got 0"):
        GroupedMixedLoRALinear(base, 0)
    with pytest.raises(ValueError, match="impl must be one of auto, torch, triton, reference"):
        GroupedMixedLoRALinear(base, 2, impl="cuda")
    with pytest.raises(ValueError, match="clients must be named"):
        GroupedMixedLoRALinear(base, 2)(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="generators must be 2, one a client, got 0"):
        GroupedMixedLoRALinear(base, 2).reset_parameters([])

"""Function transforms, second derivatives, forward mode and shapes alone, whatever ``impl`` is."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from fedalt_kernels import Adapter, Fp8Linear, MixedLoRALinear, mixed_lora_linear

IMPLEMENTATIONS = ["torch", "reference"]
EXAMPLES, TOKENS, K, N = 5, 3, 8, 6


def layer_of(impl="torch", base=None, mixer=True, dropout=0.0):
    """A float64 layer with random values in all its adapters."""
    torch.manual_seed(0)
    base = torch.nn.Linear(K, N, dtype=torch.float64) if base is None else base
    layer = MixedLoRALinear(base, 2, 4, dropout, mixer=mixer, impl=impl)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith("base."):
                parameter.normal_()
    return layer


def trained(layer):
    return {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}


def examples(dtype=torch.float64):
    return torch.randn(EXAMPLES, TOKENS, K, dtype=dtype)


@pytest.mark.parametrize("mixer", [True, "scalar", (0.3, 0.7), None], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_of_each_example_are_those_of_a_loop(impl, mixer):
    layer, x = layer_of(impl, mixer=mixer), examples()

    def loss(parameters, row):
        return functional_call(layer, parameters, (row,)).pow(2).sum()

    each = vmap(grad(loss), (None, 0))(trained(layer), x)
    for i, row in enumerate(x):
        layer.zero_grad()
        layer(row).pow(2).sum().backward()
        for name, found in each.items():
            torch.testing.assert_close(found[i], layer.get_parameter(name).grad)


@pytest.mark.parametrize("kind", ["fp8", "float32"])
def test_vmap_is_a_loop_over_other_bases_too(kind):
    base = torch.nn.Linear(K, N)
    layer = layer_of(base=Fp8Linear.from_linear(base) if kind == "fp8" else base)
    x = examples(torch.float32)
    torch.testing.assert_close(vmap(layer)(x), torch.stack([layer(row) for row in x]))


def test_vmap_over_parameters_makes_an_ensemble():
    layer, x = layer_of(), examples()[0]
    stacks = {name: torch.stack([p, 2 * p]) for name, p in trained(layer).items()}
    got = vmap(lambda parameters: functional_call(layer, parameters, (x,)))(stacks)
    for i in (0, 1):
        one = {name: stack[i] for name, stack in stacks.items()}
        torch.testing.assert_close(got[i], functional_call(layer, one, (x,)))


def test_dropout_under_vmap_goes_by_its_randomness():
    layer, x = layer_of(dropout=0.5), torch.ones(EXAMPLES, TOKENS, K, dtype=torch.float64)
    rows = {
        how: vmap(layer, randomness=how)(x).flatten(1).unique(dim=0).shape[0]
        for how in ("same", "different")
    }
    assert rows == {"same": 1, "different": EXAMPLES}
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)


def test_dropout_without_a_seed_keeps_the_expectation():
    """The mean of 2^18 numbers, each 0 or 2 by an even chance: five standard errors are allowed."""
    ones = torch.ones(4096, 1, 64, dtype=torch.float64)
    adapters = [Adapter(ones[0] / 64, ones[0, :, :1])]

    def mean_of(row):
        base = torch.zeros_like(ones[0])
        return mixed_lora_linear(row, base, None, adapters, None, scaling=1.0, dropout_p=0.5)

    torch.manual_seed(0)
    means = vmap(mean_of, randomness="different")(ones)
    assert abs(means.mean().item() - 1) < 5 / ones.numel() ** 0.5
    assert means.unique().numel() > 10


def test_layers_that_share_their_input_are_transformed_one_by_one():
    first, second = layer_of("triton"), layer_of("triton")
    MixedLoRALinear.share_input([first, second])
    x = examples()
    got = vmap(lambda row: first(row) + second(row))(x)
    torch.testing.assert_close(got, 2 * layer_of()(x))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_seed_names_one_mask_in_every_derivative(impl):
    """First and second derivatives, each also batched, and forward mode, against differences."""
    layer, x = layer_of(impl), examples()[0]
    world = Adapter(layer.rest_of_world.a.detach(), layer.rest_of_world.b.detach())

    def mixed(x, a, b, mixer):
        adapters = [Adapter(a, b), world]
        settings = {"scaling": 0.7, "dropout_p": 0.3, "seed": 3, "impl": impl}
        return mixed_lora_linear(x, layer.weight.detach(), None, adapters, mixer, **settings)

    values = (x, layer.individual.a, layer.individual.b, layer.mixer)
    values = tuple(value.detach().clone().requires_grad_() for value in values)
    checks = {"check_batched_grad": True, "check_forward_ad": True}
    assert torch.autograd.gradcheck(mixed, values, **checks)
    assert torch.autograd.gradgradcheck(mixed, values, check_batched_grad=True)


def test_a_second_derivative_is_that_of_torch_func():
    layer, x = layer_of(), examples()[0]

    def loss(row):
        return layer(row).pow(2).sum()

    row = x[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(row), row, create_graph=True)
    second = torch.stack([torch.autograd.grad(each, row, retain_graph=True)[0] for each in first])
    torch.testing.assert_close(second, hessian(loss)(x[0]))


def test_a_second_derivative_over_a_quantized_base():
    base = torch.nn.Linear(K, N)
    layer = layer_of(base=Fp8Linear.from_linear(base))
    with torch.no_grad():
        base.weight.copy_(layer.weight.dequantize(torch.float32))
    dense = layer_of(base=base)  # with the same adapters
    found = []
    for each in (layer, dense):
        row = torch.ones(1, K, requires_grad=True)
        (first,) = torch.autograd.grad(each(row).pow(2).sum(), row, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), [row, each.individual.a, each.mixer]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_forward_mode_with_dual_numbers_is_jvp():
    layer, x = layer_of(), examples()[0]
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x, x.cos()))
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, jvp(layer, (x,), (x.cos(),))[1])


def test_transforms_can_be_compiled():
    layer, x = layer_of(), examples()

    def each(parameters, x):
        def loss(parameters, row):
            return functional_call(layer, parameters, (row,)).pow(2).sum()

        return vmap(grad(loss), (None, 0))(parameters, x)

    wanted = each(trained(layer), x)
    got = torch.compile(each, backend="aot_eager", fullgraph=True)(trained(layer), x)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("impl", ["auto", "triton", "torch", "reference"])
def test_on_the_meta_device_shapes_go_through_both_ways(impl):
    layer = MixedLoRALinear(torch.nn.Linear(K, N, device="meta"), 2, dropout=0.5, impl=impl)
    MixedLoRALinear.share_input([layer, layer])
    x = torch.zeros(TOKENS, K, device="meta", requires_grad=True)
    y = layer.train()(x)
    y.sum().backward()
    assert (y.shape, y.device.type, x.grad.shape) == ((TOKENS, N), "meta", (TOKENS, K))
    assert layer.individual.a.grad.shape == (2, K)

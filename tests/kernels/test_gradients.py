"""gradcheck in float64, and what frozen parts do not get and do not cost."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedalt_kernels import Adapter, mixed_lora_linear

from .cases import SCALING, SEED, Case, apply, build, run

CASES = [
    Case(ranks=(3,)),
    Case(ranks=(3, 3)),
    Case(ranks=(3, 3), frozen=(1,)),
    Case(ranks=(1, 2, 4), frozen=(0,)),
    Case(ranks=(2, 2, 2), frozen=(1,)),
    Case(ranks=(1, 2) * 4),
    Case(ranks=(3, 2), gate="fixed"),
    Case(ranks=(3, 3), gate="none", frozen=(1,)),
    Case(ranks=(3,), gate="none", bias=False),
]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case: Case, dropout: float, impl: str) -> None:
    inputs = build(replace(case, m=3, n=5, k=37))
    named = inputs.tensors()

    def function(*values: torch.Tensor) -> torch.Tensor:
        by_name = dict(zip(named, values, strict=True))
        count = len(inputs.adapters)
        return mixed_lora_linear(
            by_name["x"],
            inputs.weight,
            inputs.bias,
            [Adapter(by_name[f"a{e}"], by_name[f"b{e}"]) for e in range(count)],
            by_name.get("mixer", inputs.mixer),
            scaling=SCALING,
            dropout_p=dropout,
            seed=SEED,
            impl=impl,
        )

    assert torch.autograd.gradcheck(function, tuple(named.values()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_frozen_adapter_gets_no_gradient(dropout: float) -> None:
    inputs = build(Case(frozen=(1,)))
    apply(mixed_lora_linear, inputs, dropout, seed=None).backward(inputs.dy)
    asked = {name for name, tensor in inputs.tensors().items() if tensor.grad is not None}
    assert asked == {"x", "mixer", "a0", "b0"}


def addmm_flops(
    _: list[int], left: list[int], right: list[int], out_shape: object = None, **options: object
) -> int:
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("asks_x", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_product_is_wasted(dropout: float, asks_x: bool) -> None:
    m, n, k, r, e = 40, 48, 64, 4, 2
    inputs = build(Case(m=m, n=n, k=k, ranks=(r, r), frozen=(1,)))
    inputs.x.requires_grad_(asks_x)
    # The in-place form is missing from the counter's own table.
    table = {torch.ops.aten.addmm_: addmm_flops}
    counter = FlopCounterMode(display=False, custom_mapping=table)
    with counter:
        run(mixed_lora_linear, inputs, dropout)
    forward = k * n + k * e * r + k * e + (e * r + 1) * n  # the bias is a column of the strip
    backward = n * e * r + (r + e) * k + r * n  # T; dA of one adapter and dG; dB of one adapter
    if asks_x:
        gate = 0 if dropout else e * k  # with dropout it is of rank one, by elements
        backward += n * k + e * r * k + gate
    assert counter.get_total_flops() == 2 * m * (forward + backward)


def test_frozen_adapter_carries_gradient_to_x_and_mixer() -> None:
    inputs = build(Case(frozen=(0, 1)))
    grads = run(mixed_lora_linear, inputs, 0.0)
    silent = replace(
        inputs, adapters=tuple(Adapter(a, torch.zeros_like(b)) for a, b in inputs.adapters)
    )
    without = run(mixed_lora_linear, silent, 0.0)
    assert grads["dmixer"].abs().max() > 0
    assert without["dmixer"].abs().max() == 0
    assert not torch.equal(grads["dx"], without["dx"])


@pytest.mark.parametrize("changed", ["x", "weight", "mixer", "a0", "b1"])
def test_what_the_backward_reads_may_not_change_before_it(changed: str) -> None:
    """Frozen tensors are watched as well."""
    inputs = build(Case(frozen=(1,)))
    y = apply(mixed_lora_linear, inputs, 0.3)
    y.add_(1)  # the output itself is free
    with torch.no_grad():
        {"weight": inputs.weight, **inputs.tensors()}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.dy)

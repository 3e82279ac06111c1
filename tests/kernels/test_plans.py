"""Plans are kept by kind of call: dropped with it, bounded in number, and blind to nothing."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fedalt_kernels import MixedLoRALinear, fused, kinds, mixed_lora_linear, plans
from fedalt_kernels.adapter import Branches
from fedalt_kernels.plans import Plans

from .cases import Case, build, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = Case(m=40, n=72, k=80, ranks=(3, 5), frozen=(1,), dtype=torch.bfloat16)
BASE = replace(BASE, param_dtype=torch.float32)
CHANGES = {
    "rows": {"m": 33},
    "columns": {"n": 64},
    "inputs": {"k": 96},
    "dtype": {"dtype": torch.float16},
    "parameters' dtype": {"param_dtype": torch.bfloat16},
    "ranks": {"ranks": (4, 5)},
    "one adapter": {"ranks": (3,), "frozen": ()},
    "fixed gates": {"gate": "fixed"},
    "no gates": {"gate": "none"},
    "no bias": {"bias": False},
    "transposed": {"transposed": True},
    "dropout": {"dropout": 0.3},
    "other gradients": {"frozen": (0,)},
    "no alignment": {"k": 83},
}


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("change", CHANGES)
def test_another_kind_of_call_gets_its_own_plan(change: str, impl: str) -> None:
    """Between calls of the first kind, as if no plan had been kept."""
    call = partial(mixed_lora_linear, impl=impl)
    other = replace(BASE, **CHANGES[change])
    first, kept, again = (
        run(call, build(case, 0, DEVICE), case.dropout) for case in (BASE, other, BASE)
    )
    plans.forget()
    fresh = run(call, build(other, 0, DEVICE), other.dropout)
    for one, same in ((first, again), (kept, fresh)):
        assert one.keys() == same.keys()
        for name, value in one.items():
            assert torch.equal(value, same[name]), name


def layer(impl: str, **settings: object) -> MixedLoRALinear:
    torch.manual_seed(0)
    made = MixedLoRALinear(nn.Linear(80, 72), rank=4, dropout=0.0, impl=impl, **settings)
    for adapter in made.adapters:
        nn.init.normal_(adapter.a)
        nn.init.normal_(adapter.b)
    return made.to(DEVICE)


def set_rank_and_scale(made: MixedLoRALinear) -> None:
    made.alpha *= 2
    made.set_rank(6)
    nn.init.normal_(made.individual.b)


CHANGED: dict[str, tuple[dict[str, object], Callable[[MixedLoRALinear], object]]] = {
    "values behind autograd's back": ({}, lambda made: made.individual.b.data.add_(1)),
    "an optimizer's step": ({}, lambda made: made.mixer.detach().mul_(3)),
    "another tensor in the parameter": (
        {},
        lambda made: setattr(made.individual.a, "data", torch.randn_like(made.individual.a)),
    ),
    "another parameter": (
        {},
        lambda made: setattr(made.individual, "a", nn.Parameter(torch.ones(4, 80, device=DEVICE))),
    ),
    "another rank and scale": ({"rest_of_world": False}, set_rank_and_scale),
    "another scale": ({}, lambda made: setattr(made, "scaling", 0.5)),
    "another base": ({}, lambda made: made.base.weight.data.mul_(-1)),
}


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_layer_is_computed_as_it_is(change: str, impl: str) -> None:
    settings, alter = CHANGED[change]
    made, x = layer(impl, **settings), torch.randn(70, 80, device=DEVICE)
    before = made(x)
    alter(made)
    after = made(x)
    assert not torch.equal(before, after)
    plans.forget()
    assert torch.equal(after, made(x))


def test_what_is_refused_is_refused_again() -> None:
    inputs = build(BASE, 0, DEVICE)
    call = partial(mixed_lora_linear, impl="torch")
    for _ in range(2):
        run(call, inputs, 0.0)
        with pytest.raises(ValueError, match="dropout_p must be in"):
            run(call, inputs, 1.5)
        with pytest.raises(ValueError, match="weight must be frozen"):
            run(call, replace(inputs, weight=inputs.weight.requires_grad_()), 0.0)
        inputs.weight.requires_grad_(False)


def test_a_plan_holds_no_tensor_of_the_call_that_made_it() -> None:
    inputs = build(replace(BASE, dropout=0.3), 0, DEVICE)
    run(partial(mixed_lora_linear, impl="triton"), inputs, 0.3)
    held = [weakref.ref(tensor) for tensor in inputs.tensors().values()]
    assert fused._forwards
    assert fused._backwards
    del inputs
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_ten_thousand_lengths_do_not_grow_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which most would be prompts; here nothing is launched for them."""
    monkeypatch.setattr(fused, "plan_forward", lambda x, *_: lambda *_: (x.shape[0],))
    weight = torch.zeros(16, 8, device=DEVICE)
    branches = Branches([torch.zeros(2, 8)], [torch.zeros(16, 2)], None, None, 1.0, 0, None)
    rows = torch.zeros(10_000, 8, device=DEVICE)
    for m in range(1, 10_001):
        assert fused.forward(rows[:m], weight, None, branches) == (m,)
    assert 0 < len(fused._forwards) <= plans.MOST


def test_a_full_table_begins_anew() -> None:
    table: Plans[Tensor] = Plans()
    for key in range(plans.MOST + 3):
        table.made(key, lambda: torch.zeros(()))
    assert len(table) == 3
    plans.forget()
    assert not table


def test_kinds_are_bounded_by_settings_not_by_lengths() -> None:
    made = layer("torch")
    for m in range(1, 200):
        made(torch.zeros(m, 80, device=DEVICE))
    assert len(kinds._kinds) == 1

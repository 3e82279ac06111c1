"""Many clients in one pass, against a loop of the float64 specification over clients."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedalt_kernels import (
    Adapter,
    Segments,
    merged,
    mixed_lora_linear,
    mixed_lora_linear_grouped,
)
from fedalt_kernels.reference import reference

from .budget import assert_within_budget
from .cases import SCALING, Case, Inputs, build
from .quantizing import STORAGES, exact, quantize

pytestmark = pytest.mark.usefixtures("poison")

SIZES = [(7,), (12, 5), (0, 8, 0, 19), (14, 0, 8, 27, 9), (0, *range(8, 23)), (0, 0)]
GATES = [
    Case(frozen=(1,)),
    Case(ranks=(2, 5, 1), frozen=(0,)),
    Case(gate="fixed"),
    Case(ranks=(4,), gate="none"),
]
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


def many(case: Case, count: int, seed: int = 0) -> Inputs:
    """As `build`, with the adapters and mixers of `count` clients stacked."""
    each = [build(case, seed * count + c) for c in range(count)]

    def stacked(tensors: list[Tensor]) -> Tensor:
        wants = tensors[0].requires_grad
        return torch.stack([t.detach() for t in tensors]).requires_grad_(wants)

    mixers = [inputs.mixer for inputs in each]
    return replace(
        each[0],
        adapters=tuple(
            Adapter(*(stacked(list(factors)) for factors in zip(*own, strict=True)))
            for own in zip(*(inputs.adapters for inputs in each), strict=True)
        ),
        mixer=stacked(mixers) if isinstance(mixers[0], Tensor) else mixers[0],
    )


def results(inputs: Inputs, y: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    named = {name: each for name, each in inputs.tensors().items() if each.requires_grad}
    grads = torch.autograd.grad(y, list(named.values()), inputs.dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(named, grads, strict=True)}


def arguments(inputs: Inputs) -> tuple[object, ...]:
    return inputs.x, inputs.weight, inputs.bias, inputs.adapters, inputs.mixer


def grouped(inputs: Inputs, clients: list[int], dropout: float, **more: object) -> Tensor:
    count = len(inputs.adapters[0].a)
    settings = {"scaling": SCALING, "dropout_p": dropout, "seeds": range(30, 30 + count), **more}
    return mixed_lora_linear_grouped(*arguments(inputs), clients, **settings)


def looped(inputs: Inputs, clients: list[int], dropout: float) -> Tensor:
    """Row by row of the loop over clients, written without `Segments`."""
    count = len(inputs.adapters[0].a)
    where = torch.tensor(clients, dtype=torch.int64)
    y = inputs.x.new_empty(len(clients), len(inputs.weight))
    for c in range(count):
        y = y.index_put(
            (where == c,),
            reference(
                inputs.x[where == c],
                inputs.weight,
                inputs.bias,
                [Adapter(a[c], b[c]) for a, b in inputs.adapters],
                inputs.mixer[c] if isinstance(inputs.mixer, Tensor) else inputs.mixer,
                scaling=SCALING,
                dropout_p=dropout,
                seed=30 + c,
            ),
        )
    return y


def rows_of(sizes: tuple[int, ...], shuffled: bool) -> list[int]:
    clients = [c for c, size in enumerate(sizes) for _ in range(size)]
    if shuffled:
        order = torch.randperm(len(clients), generator=torch.Generator().manual_seed(1))
        clients = [clients[i] for i in order.tolist()]
    return clients


def pooled(draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in draws]) for name in draws[0]}


def check(
    case: Case,
    sizes: tuple[int, ...],
    shuffled: bool,
    function: Callable[..., Tensor] = grouped,
    draws: int = 0,
) -> None:
    clients = rows_of(sizes, shuffled)
    case = replace(case, m=len(clients))
    # Of a few rows, eager's error is luck; as `parity.check`, but for every client.
    draws = draws or max(8, 64 // min((size for size in sizes if size), default=8))
    inputs = [many(case, len(sizes), draw) for draw in range(draws)]
    wide = [each.in_float64() for each in inputs]
    truth = pooled([results(each, looped(each, clients, case.dropout)) for each in wide])
    eager = pooled([results(each, looped(each, clients, case.dropout)) for each in inputs])
    got = pooled([results(each, function(each, clients, case.dropout)) for each in inputs])
    if clients:
        assert_within_budget(got, eager, truth, length=max(case.m, case.n, case.k))
    else:
        assert all(torch.equal(value, truth[name].to(value)) for name, value in got.items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("gates", GATES, ids=lambda case: f"{case.gate}-{len(case.ranks)}")
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)}-of-{sum(sizes)}")
def test_error_budget(
    sizes: tuple[int, ...],
    gates: Case,
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    dropout: float,
) -> None:
    case = replace(gates, n=33, k=34, dtype=dtype, param_dtype=param_dtype, dropout=dropout)
    check(case, sizes, shuffled=len(sizes) % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clients_of_one_row(dtype: torch.dtype) -> None:
    check(Case(n=33, k=34, dropout=0.3, dtype=dtype, param_dtype=torch.float32), (1, 0, 1, 2), True)


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_specification_is_the_loop(shuffled: bool) -> None:
    def specified(inputs: Inputs, clients: list[int], dropout: float) -> Tensor:
        return grouped(inputs, clients, dropout, impl="reference")

    case = Case(dropout=0.3, dtype=torch.float32, param_dtype=torch.float32)
    check(case, (4, 0, 1, 7, 2), shuffled, specified)


def wrong_client(patch: pytest.MonkeyPatch) -> None:
    slices = Segments.slices

    def shifted(segments: Segments) -> list[tuple[int, slice]]:
        count = len(segments.sizes)
        return [((client + 1) % count, part) for client, part in slices(segments)]

    patch.setattr(Segments, "slices", shifted)


def one_mask_for_all(patch: pytest.MonkeyPatch) -> None:
    keep_rows = merged.keep_rows
    patch.setattr(merged, "keep_rows", lambda seed, *rest: keep_rows(30, *rest))


def never_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Segments, "restore", lambda segments, rows: rows)


@pytest.mark.parametrize("fault", [wrong_client, one_mask_for_all, never_restored])
def test_budget_refuses_faults(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(dropout=0.3, dtype=torch.float32, param_dtype=torch.float32)
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="times its budget"):
        check(case, (4, 0, 1, 7, 2), shuffled=True)


def test_a_clients_mask_is_the_one_it_has_alone() -> None:
    """With one adapter and no base, what is dropped shows: y is the mask times x."""
    clients = torch.tensor([2, 0, 2, 0, 0, 2])
    x = torch.rand(6, 40) + 1
    eye = torch.eye(40).expand(3, 40, 40)
    y = mixed_lora_linear_grouped(
        x,
        torch.zeros(40, 40),
        None,
        [Adapter(eye, eye)],
        None,
        clients,
        scaling=1.0,
        dropout_p=0.5,
        seeds=torch.tensor([5, 6, 7]),
    )
    for client, seed in ((0, 5), (2, 7)):
        alone = mixed_lora_linear(
            x[clients == client],
            torch.zeros(40, 40),
            None,
            [Adapter(torch.eye(40), torch.eye(40))],
            None,
            scaling=1.0,
            dropout_p=0.5,
            seed=seed,
        )
        assert 0 < (alone == 0).float().mean() < 1
        assert torch.equal(y[clients == client], alone)


def test_one_client_is_the_single_layer_to_the_bit() -> None:
    case = Case(m=65, dropout=0.3, dtype=torch.float32, param_dtype=torch.float32)
    inputs = many(case, 1)
    single = replace(
        build(case),
        adapters=[Adapter(a[0], b[0]) for a, b in inputs.adapters],
        mixer=inputs.mixer[0],
    )
    alone = mixed_lora_linear(*arguments(single), scaling=SCALING, dropout_p=0.3, seed=30)
    for impl in ("auto", "torch"):
        assert torch.equal(grouped(inputs, [0] * 65, 0.3, impl=impl), alone)


def test_whole_sequences_and_beams_take_one_number_each() -> None:
    inputs = many(Case(m=12, dtype=torch.float32, param_dtype=torch.float32), 3)
    rows = grouped(inputs, [2] * 4 + [0] * 4 + [2] * 4, 0.0)
    cube = replace(inputs, x=inputs.x.view(3, 4, -1))
    assert torch.equal(grouped(cube, [2, 0, 2], 0.0).view(12, -1), rows)
    segments = Segments.of([2, 0, 2], 3)
    assert torch.equal(grouped(cube, segments, 0.0).view(12, -1), rows)
    last = replace(inputs, x=inputs.x[0])
    assert torch.equal(grouped(last, [1], 0.0), grouped(replace(inputs, x=inputs.x[:1]), [1], 0)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("storage", STORAGES)
def test_quantized_bases(storage: str, dropout: float) -> None:
    clients, draws = [1, 1, 2, 0, 2, 2, 1], []
    case = Case(n=32, k=32, m=7, dtype=torch.bfloat16, param_dtype=torch.float32, dropout=dropout)
    for draw in range(16):
        inputs = many(case, 3, draw)
        packed = quantize(inputs.weight, storage)
        dense = exact(packed)
        eager = replace(inputs, weight=dense.to(case.dtype))
        wide = replace(inputs.in_float64(), weight=dense)
        draws.append(
            [
                results(inputs, grouped(replace(inputs, weight=packed), clients, dropout)),
                results(eager, looped(eager, clients, dropout)),
                results(wide, looped(wide, clients, dropout)),
            ]
        )
    assert_within_budget(*(pooled(list(each)) for each in zip(*draws, strict=True)), length=32)


def test_autocast_computes_in_its_dtype() -> None:
    case = Case(dtype=torch.float32, param_dtype=torch.float32, dropout=0.3)
    inputs, clients = many(case, 3), [0, 2, 2, 1, 0, 0, 0]
    narrow = replace(
        inputs,
        x=inputs.x.detach().bfloat16().requires_grad_(),
        weight=inputs.weight.bfloat16(),
        bias=inputs.bias.bfloat16(),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped(inputs, clients, 0.3)
    assert y.dtype == torch.bfloat16
    got = results(replace(inputs, dy=inputs.dy.bfloat16()), y)
    want = results(replace(narrow, dy=inputs.dy.bfloat16()), grouped(narrow, clients, 0.3))
    assert got["dx"].dtype == torch.float32
    assert all(torch.equal(got[name], value.to(got[name])) for name, value in want.items())


def refuse(match: str, **changes: object) -> None:
    inputs = many(Case(dtype=torch.float32, param_dtype=torch.float32), 3)
    named = dict(zip(("x", "weight", "bias", "adapters", "mixer"), arguments(inputs), strict=True))
    settings = {"clients": [0] * 7, "scaling": 1.0, "dropout_p": 0.1, "seeds": [1, 2, 3]}
    with pytest.raises((TypeError, ValueError), match=match):
        mixed_lora_linear_grouped(**{**named, **settings, **changes})


def test_refusals_name_the_argument() -> None:
    inputs = many(Case(dtype=torch.float32, param_dtype=torch.float32), 3)
    refuse(r"clients must be 0 to 2, got 3", clients=[3] * 7)
    refuse(r"clients must be 0 to 2, got -1", clients=[-1] * 7)
    refuse(r"clients must be whole numbers, got 0.5", clients=[0.5] * 7)
    refuse(r"x has 7 rows, no multiple of the 2 clients named", clients=[0, 1])
    refuse(r"x has 7 rows, no multiple of the 0 clients named", clients=[])
    refuse(r"clients must be segments of 3, got 2", clients=Segments.of([0], 2))
    refuse(r"mixer must be of 3 clients, got 2", mixer=inputs.mixer[:2])
    refuse(r"mixer must be stacked \[C, ., .\], got \[2, 17\]", mixer=inputs.mixer[0])
    refuse(r"adapters\[0\] must be an Adapter", adapters=[inputs.x])
    refuse(r"adapters must be 1 to 8, got 0", adapters=[])
    refuse(r"seeds must be 3, one a client, got 2", seeds=[1, 2])
    refuse(r"seed must be in \[0, 2\*\*63\), got -1", seeds=[1, 2, -1])
    refuse(r"impl must be one of auto, torch, triton, reference, got 'cuda'", impl="cuda")

"""The Triton kernels for many clients against a loop of the float64 specification over clients."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from fedalt_kernels import Segments, grouped_api, grouped_fused
from fedalt_kernels.triton import clients as tables

from .cases import Case
from .quantizing import exact, quantize
from .test_grouped import check, grouped, many, results, rows_of

pytestmark = pytest.mark.usefixtures("poison")

fused = partial(grouped, impl="triton")
# Blocks have 32 rows in the interpreter: a client has none, one, a whole and several of them.
UNEVEN = (3, 0, 32, 40, 1)
ALIGNED = Case(n=72, k=80, ranks=(3, 5), frozen=(1,), param_dtype=torch.float32)
ODD = Case(n=73, k=83, ranks=(3, 5, 2), frozen=(0,), bias=False, param_dtype=torch.float32)
HALF = replace(ALIGNED, n=40, k=33)
CASES = {
    "aligned": (ALIGNED, UNEVEN),
    "aligned, dropout": (replace(ALIGNED, dropout=0.3), UNEVEN),
    "odd": (ODD, UNEVEN),
    "odd, dropout": (replace(ODD, dropout=0.3), UNEVEN),
    "one client": (HALF, (70,)),
    "sixteen clients": (replace(HALF, dropout=0.3), (0, 33, *(2,) * 14)),
    "transposed": (replace(HALF, transposed=True, gate="none"), (33, 40)),
    "fixed gates": (replace(HALF, gate="fixed", dropout=0.3), (33, 40)),
    "two blocks of ranks": (replace(HALF, ranks=(130, 20), frozen=()), (35, 33)),
    "eight adapters": (replace(HALF, ranks=(1, 2) * 4, frozen=(0, 3), dropout=0.3), (35, 33)),
    "few rows": (ALIGNED, (3, 0, 7, 1)),
    "few rows, odd": (replace(ODD, n=40, k=261), (3, 0, 1)),
    "few rows in order": (replace(ALIGNED, gate="fixed"), (4, 5)),
    "a row of each": (replace(HALF, ranks=(7,), frozen=(), gate="none"), (1,) * 16),
    "few rows, wide ranks": (replace(HALF, ranks=(40, 20), frozen=()), (2, 1)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TURNS = [
    pytest.param(replace(case, dtype=dtype), sizes, id=f"{name}, {dtype}")
    for number, (name, (case, sizes)) in enumerate(CASES.items())
    for dtype in [DTYPES[number % 3]]
]


@pytest.mark.parametrize(("case", "sizes"), TURNS)
def test_error_budget(case: Case, sizes: tuple[int, ...]) -> None:
    draws = 1 if sum(sizes) > 15 else 2
    check(case, sizes, shuffled=len(sizes) != 2, function=fused, draws=draws)


@pytest.mark.parametrize("sizes", [(3, 0, 32, 70, 1), (64,), (0, 0), (32, 32), (0, 1, 0)])
def test_the_table_says_whose_every_block_is(sizes: tuple[int, ...]) -> None:
    blocks, starts = tables.table(sizes, 32, torch.device("cpu"))
    assert starts.tolist() == [sum(sizes[:c]) for c in range(len(sizes) + 1)]
    assert len(blocks) == tables.blocks_at_most(sum(sizes), len(sizes), 32)
    seen = [
        (client, row)
        for client, place in blocks.tolist()
        for row in range(place * 32, min(sizes[client], place * 32 + 32))
    ]
    assert seen == [(client, row) for client, size in enumerate(sizes) for row in range(size)]


@pytest.mark.parametrize(("sizes", "dropout"), [(UNEVEN, 0.3), ((3, 0, 4), 0.0)])
def test_runs_repeat_bit_for_bit(sizes: tuple[int, ...], dropout: float) -> None:
    clients = rows_of(sizes, shuffled=True)
    inputs = many(replace(HALF, m=len(clients), dtype=torch.bfloat16), len(sizes))
    first, second = (results(inputs, fused(inputs, clients, dropout)) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_client_is_bit_for_bit_what_it_is_beside_others() -> None:
    inputs = many(replace(HALF, m=73, dtype=torch.float32), 3)
    both = replace(inputs, weight=torch.zeros_like(inputs.weight))
    one = replace(both, x=inputs.x.detach()[33:].requires_grad_(), dy=inputs.dy[33:])
    together = results(both, fused(both, rows_of((33, 40, 0), shuffled=False), 0.3))
    alone = results(one, fused(one, [1] * 40, 0.3))
    for name, value in together.items():
        of_rows = name in ("y", "dx")
        assert torch.equal(value[33:] if of_rows else value[1], alone[name][() if of_rows else 1])


@pytest.mark.parametrize("rows", [7, 70])
def test_a_quantized_base_is_written_out_for_the_base_product(rows: int) -> None:
    case = Case(m=rows, n=32, k=32, dtype=torch.bfloat16, param_dtype=torch.float32)
    inputs, clients = many(case, 3), [1, 2, 0, 2, 1, 1, 2] * (rows // 7)
    packed = quantize(inputs.weight, "nf4")
    dense = replace(inputs, weight=exact(packed).to(case.dtype))
    mine = fused(replace(inputs, weight=packed), clients, 0.0)
    assert torch.equal(mine, fused(dense, clients, 0.0))


def test_no_kernel_serves_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    find = grouped_api.find
    monkeypatch.setattr(grouped_api, "find", lambda *of: asked.append(of[-1][2]) or find(*of))
    inputs = many(Case(dtype=torch.float32, param_dtype=torch.float32), 2)
    for impl in ("auto", "torch", "triton"):
        grouped(inputs, [0, 1] + [0] * 5, 0.0, impl=impl)
    assert asked == ["torch", "torch", "triton"]


def factors_of_the_next_client(patch: pytest.MonkeyPatch) -> None:
    made = tables.stack

    def rolled(*of: object) -> tables.Stack:
        return tables.Stack(*(each.roll(1, 0) for each in made(*of)))

    patch.setattr(grouped_fused, "stack", rolled)


def clients_that_begin_early(patch: pytest.MonkeyPatch) -> None:
    made = tables.table

    def early(*of: object) -> tables.Table:
        table = made(*of)
        table.starts[1:-1] -= 1
        return table

    patch.setattr(grouped_fused, "table", early)


def owners_in_another_order(patch: pytest.MonkeyPatch) -> None:
    owners = Segments.owners
    patch.setattr(Segments, "owners", lambda *of: owners(*of).roll(1))


FAULTS = [
    (factors_of_the_next_client, (33, 40, 7)),
    (clients_that_begin_early, (33, 40, 7)),
    (owners_in_another_order, (3, 4, 2)),
]


@pytest.mark.parametrize(("fault", "sizes"), FAULTS)
def test_budget_refuses_faults(
    fault: Callable[[pytest.MonkeyPatch], None],
    sizes: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check(replace(HALF, dtype=torch.float32), sizes, False, fused, draws=1)

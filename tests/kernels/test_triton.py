"""Every schedule of the Triton kernels against float64, in the interpreter or on a GPU.

Tiles are those of the device: 32 by 32 by 32 in the interpreter, so that small odd shapes have
several tiles and a ragged edge in every direction.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from fedalt_kernels import Adapter, fused_backward, fused_forward, mixed_lora_linear
from fedalt_kernels.checks import SCHEDULES
from fedalt_kernels.triton import decode, overlapped, overlapped_backward, reduce, tiles
from fedalt_kernels.triton.pack import Packed

from .cases import Case, build, run
from .parity import check

pytestmark = pytest.mark.usefixtures("poison")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Aligned shapes go through descriptors, odd ones through pointers.
ALIGNED = Case(m=40, n=72, k=80, ranks=(3, 5), frozen=(1,))
ODD = Case(m=37, n=73, k=83, ranks=(3, 5, 2), frozen=(0,), bias=False)
CASES = {
    "aligned": ALIGNED,
    "odd": ODD,
    "transposed": replace(ALIGNED, transposed=True),
    "odd transposed": replace(ODD, transposed=True),
    "all trained, odd rows": replace(ALIGNED, m=33, frozen=()),
    "fixed gates": replace(ALIGNED, gate="fixed"),
    "no gates, one adapter": replace(ODD, ranks=(4,), frozen=(), gate="none"),
    "eight adapters": replace(ALIGNED, ranks=(1, 2) * 4, frozen=(0, 3, 4)),
    "two blocks of ranks": replace(ALIGNED, ranks=(130, 20), frozen=()),
    "rank 256": replace(ALIGNED, ranks=(256,), frozen=()),
    "second adapter trained": replace(ODD, ranks=(20, 12), frozen=(0,)),
    "one row": replace(ALIGNED, m=1),
    "as many rows as decode serves": replace(ALIGNED, m=64),
}
if ON_GPU:
    CASES["whole tiles"] = replace(ALIGNED, m=384, n=768, k=640, ranks=(8, 8))
    CASES["ragged tiles"] = replace(ALIGNED, m=300, n=520, k=328, ranks=(16, 48))


def forced(schedule: str) -> Callable[..., Tensor]:
    return partial(mixed_lora_linear, impl="triton", schedule=schedule)


def serves(schedule: str, case: Case) -> bool:
    ranks = tiles.side_by_side(case.ranks, case.dtype)
    x = torch.empty(case.m, case.k, dtype=case.dtype, device=DEVICE)
    return tiles.unserved(schedule, x, ranks, case.dropout > 0) is None


def parameters() -> list[object]:
    """Every schedule with every case that it serves, the dtypes taking turns."""
    found = []
    for schedule in SCHEDULES:
        for number, (name, case) in enumerate(CASES.items()):
            for dropout in (0.0, 0.3):
                for dtype in DTYPES if name in ("aligned", "odd") else [DTYPES[number % 3]]:
                    full = replace(case, dtype=dtype, param_dtype=torch.float32, dropout=dropout)
                    few = case.m == 1 and schedule != "decode"  # many draws, and nothing new
                    if serves(schedule, full) and not few:
                        label = f"{schedule}, {name}, {dtype}, dropout {dropout}"
                        found.append(pytest.param(schedule, full, id=label))
    return found


@pytest.mark.parametrize(("schedule", "case"), parameters())
def test_error_budget(schedule: str, case: Case) -> None:
    check(case, forced(schedule), least_draws=2, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_parameters_of_16_bits(schedule: str, dtype: torch.dtype) -> None:
    check(replace(ALIGNED, dtype=dtype, param_dtype=dtype), forced(schedule), 2, DEVICE)


@pytest.mark.parametrize("rows", [16, 40, 70])
def test_auto_schedule(rows: int) -> None:
    case = replace(ALIGNED, m=rows, dtype=torch.bfloat16, param_dtype=torch.float32)
    check(case, partial(mixed_lora_linear, impl="triton"), 2, DEVICE)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_adapters_of_two_dtypes(schedule: str) -> None:
    inputs = build(replace(ALIGNED, dtype=torch.bfloat16, param_dtype=torch.float32), 0, DEVICE)
    one, other = inputs.adapters
    same = replace(inputs, adapters=(one, type(other)(*(t.bfloat16().float() for t in other))))
    mixed = replace(inputs, adapters=(one, type(other)(*(t.bfloat16() for t in other))))
    pairs = [run(forced(schedule), each, 0.0)["y"] for each in (same, mixed)]
    assert torch.equal(*pairs)


REPEATED = [(schedule, 0.0) for schedule in SCHEDULES]
REPEATED += [(schedule, 0.3) for schedule in ("overlapped", "split", "expand")]


@pytest.mark.parametrize(("schedule", "dropout"), REPEATED)
def test_runs_repeat_bit_for_bit(schedule: str, dropout: float) -> None:
    case = replace(ALIGNED, dtype=torch.bfloat16, param_dtype=torch.float32, dropout=dropout)
    inputs = build(case, 0, DEVICE)
    first, second = (run(forced(schedule), inputs, dropout) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("schedule", ["overlapped", "decode"])
def test_counters_are_left_clean(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    for module in (overlapped, overlapped_backward, decode, reduce):
        monkeypatch.setattr(module, "counters", lambda device, length: held)
    inputs = build(replace(ALIGNED, dtype=torch.float32, param_dtype=torch.float32), 0, DEVICE)
    results = []
    for _ in range(2):
        results.append(run(forced(schedule), inputs, 0.0))
        assert not held.any()
    assert torch.equal(results[0]["y"], results[1]["y"])


def test_frozen_parts_cost_no_sums_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(ALIGNED, frozen=(0, 1), gate="fixed", dtype=torch.float32)
    inputs = build(replace(case, param_dtype=torch.float32), 0, DEVICE)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a frozen adapter was given gradient work")

    monkeypatch.setattr(fused_backward, "reducing", forbidden)
    spans = []
    spreading = fused_backward.spreading
    monkeypatch.setattr(
        fused_backward,
        "spreading",
        lambda *arguments: spans.append(arguments[-1]) or spreading(*arguments),
    )
    run(forced("split"), inputs, 0.0)
    assert spans == [None]


def test_only_the_trained_ranks_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = []
    reducing = fused_backward.reducing
    monkeypatch.setattr(
        fused_backward,
        "reducing",
        lambda *arguments, **flags: spans.append(arguments[6]) or reducing(*arguments, **flags),
    )
    case = replace(ALIGNED, ranks=(20, 7), frozen=(0,), dtype=torch.float32)
    run(forced("split"), build(replace(case, param_dtype=torch.float32), 0, DEVICE), 0.0)
    assert spans == [(20, 16, 27)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layout", ["columns", "expanded", "every other", "broadcast bias"])
def test_inputs_of_any_strides(schedule: str, layout: str) -> None:
    case = replace(ALIGNED, dtype=torch.bfloat16, param_dtype=torch.float32)
    inputs = build(case, 0, DEVICE)
    x, bias = inputs.x.detach(), inputs.bias
    if layout == "columns":
        x = x.t().contiguous().t()
    elif layout == "expanded":
        x = x[:1].expand(case.m, case.k)
    elif layout == "every other":
        x = torch.stack((x, x), -1).flatten(1)[:, ::2]
        bias = torch.stack((bias, bias), -1).flatten()[::2]
    else:
        bias = bias[:1].expand(case.n)
    strided = replace(inputs, x=x.requires_grad_(), bias=bias)
    plain = replace(
        inputs, x=x.detach().contiguous().requires_grad_(), bias=bias.clone().contiguous()
    )
    dense = run(forced(schedule), plain, 0.0)
    for name, value in run(forced(schedule), strided, 0.0).items():
        assert torch.equal(value, dense[name]), name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_large_products_stay_finite_in_float16(schedule: str) -> None:
    """P is near the top of float16 and s would carry it over."""
    k, n = 64, 32
    x = torch.full((40, k), 16.0, dtype=torch.float16, device=DEVICE)
    a = torch.full((4, k), 32.0, device=DEVICE)
    b = torch.full((n, 4), 2.0**-12, device=DEVICE)
    weight = torch.zeros(n, k, dtype=torch.float16, device=DEVICE)
    y = mixed_lora_linear(
        x, weight, None, [Adapter(a, b)], None, scaling=16.0, impl="triton", schedule=schedule
    )
    assert torch.equal(y, torch.full_like(y, 16.0 * 16 * 32 * k * 4 * 2.0**-12))


def test_rows_beyond_two_to_the_31_elements() -> None:
    """x of three rows so far apart that their offsets need 64 bits; unused pages cost nothing."""
    torch.use_deterministic_algorithms(False)  # which would fill, hence touch, all of it
    m, n, k = 3, 32, 64
    stride = 2**30 + 32
    far = torch.empty(2 * stride + k, dtype=torch.float16, device=DEVICE)
    x = far.as_strided((m, k), (stride, 1))
    near = build(Case(m, n, k, dtype=torch.float16, param_dtype=torch.float32), 0, DEVICE)
    x.copy_(near.x.detach())
    for schedule in SCHEDULES:
        y = run(forced(schedule), near, 0.0)
        distant = run(forced(schedule), replace(near, x=x.requires_grad_()), 0.0)
        for name, value in y.items():
            assert torch.equal(value, distant[name]), (schedule, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_kernel_is_noticed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is tight enough to see one adapter's gate taken for the other's."""
    case = replace(ALIGNED, dtype=dtype, param_dtype=torch.float32)
    packing = fused_forward.packing

    def swapping(*arguments: object) -> Callable[..., Packed]:
        pack = packing(*arguments)

        def swapped(*tensors: object) -> Packed:
            packed = pack(*tensors)
            router = packed.routers[0].view(16, -1)[[1, 0, *range(2, 8), 9, 8, *range(10, 16)]]
            return packed._replace(routers=[router.flatten()])

        return swapped

    monkeypatch.setattr(fused_forward, "packing", swapping)
    with pytest.raises(AssertionError, match="times its budget"):
        check(case, forced("split"), 2, DEVICE)

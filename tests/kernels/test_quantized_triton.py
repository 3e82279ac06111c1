"""Quantized base weights in the Triton kernels, in the interpreter or on a GPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from fedalt_kernels import mixed_lora_linear, weights

from .cases import Case, build, run
from .quantizing import STORAGES, check, quantize, triple

pytestmark = pytest.mark.usefixtures("poison")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASE = Case(m=20, n=40, k=48, ranks=(3, 5), frozen=(1,), param_dtype=torch.float32)


def forced(schedule: str | None) -> partial[Tensor]:
    return partial(mixed_lora_linear, impl="triton", schedule=schedule)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all weights that a kernel writes out."""
    shapes: list[tuple[int, ...]] = []
    dequantize = weights.dequantize

    def recorded(*arguments: object) -> Tensor:
        shapes.append(tuple(arguments[-1].shape))
        return dequantize(*arguments)

    monkeypatch.setattr(weights, "dequantize", recorded)
    return shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 17), (24, 48), (1, 1), (9, 600)], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_the_kernel_writes_what_the_definition_says(
    storage: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Bit for bit in the interpreter; a GPU may fuse two roundings of nested statistics into one,
    which can move a result to the next number of its dtype."""
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(*shape, generator=generator).to(DEVICE), storage)
    got, expected = weights.matrix(weight, dtype).clone(), weight.dequantize(dtype)
    if ON_GPU and storage == "nested nf4":
        allowed = expected.double().abs() * torch.finfo(dtype).eps + 2.0**-22 * expected.abs().max()
        assert ((got.double() - expected.double()).abs() <= allowed).all()
    else:
        assert torch.equal(got, expected)


def decoded() -> list[object]:
    """Every storage in every dtype, its tiles in turn half a block, two blocks, and ragged."""
    found = []
    for i, storage in enumerate(STORAGES):
        for j, dtype in enumerate(DTYPES):
            block, k = [(64, 64), (16, 80), (16, 48)][(i + j) % 3]
            case = replace(BASE, k=k, dtype=dtype, bias=j != 1)
            found.append(pytest.param(storage, block, case, id=f"{storage}, {dtype}, {block}"))
    return found


@pytest.mark.parametrize(("storage", "block", "case"), decoded())
def test_decode_reads_the_storage(
    storage: str, block: int, case: Case, written: list[tuple[int, ...]]
) -> None:
    check(case, storage, forced("decode"), 2, block, DEVICE, gradients=False)
    assert written == []


@pytest.mark.parametrize(("storage", "block", "k"), [("nf4", 16, 83), ("nested nf4", 64, 34)])
def test_decode_of_blocks_that_cross_rows(
    storage: str, block: int, k: int, written: list[tuple[int, ...]]
) -> None:
    """They are written out first."""
    case = replace(BASE, k=k, dtype=torch.bfloat16)
    check(case, storage, forced("decode"), 2, block, DEVICE, gradients=False)
    assert written == [(case.n, k)] * 2


@pytest.mark.parametrize("number", range(len(STORAGES)), ids=STORAGES)
def test_gradients_after_decode(number: int, written: list[tuple[int, ...]]) -> None:
    case = replace(BASE, dtype=DTYPES[number % 3])
    check(case, STORAGES[number], forced("decode"), 1, 16, DEVICE)
    assert written == [(case.n, case.k)]


@pytest.mark.parametrize(
    ("storage", "schedule", "dtype", "dropout"),
    [
        ("nf4", "recompute", torch.float16, 0.0),
        ("nested nf4", "overlapped", torch.bfloat16, 0.0),
        ("int8", "split", torch.bfloat16, 0.3),
        ("fp8", "expand", torch.float32, 0.3),
        ("nested nf4", None, torch.float16, 0.0),
    ],
)
def test_schedules_of_a_matrix(
    storage: str,
    schedule: str | None,
    dtype: torch.dtype,
    dropout: float,
    written: list[tuple[int, ...]],
) -> None:
    case = replace(BASE, m=66, n=37 if schedule is None else 40, dropout=dropout, dtype=dtype)
    check(case, storage, forced(schedule), 1, 16, DEVICE)
    assert written == [(case.n, case.k)] * 2


def test_the_schedule_is_that_of_a_matrix(written: list[tuple[int, ...]]) -> None:
    for m, times in ((5, 0), (70, 1)):
        inputs, _, _ = triple(build(replace(BASE, m=m, dtype=torch.bfloat16), 0, DEVICE), "nf4")
        with torch.no_grad():
            mixed_lora_linear(
                inputs.x, inputs.weight, None, inputs.adapters, None, scaling=1.0, impl="triton"
            )
        assert len(written) == times


def test_a_backward_that_needs_no_weight_writes_none(written: list[tuple[int, ...]]) -> None:
    inputs, _, _ = triple(build(replace(BASE, dtype=torch.bfloat16), 0, DEVICE), "nf4")
    run(forced("decode"), replace(inputs, x=inputs.x.detach()), 0.0)
    assert written == []

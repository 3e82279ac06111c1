"""Outputs and gradients against the float64 specification, within eager PyTorch's own error."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedalt_kernels import merged, mixed_lora_linear

from .cases import Case
from .parity import check

SHAPES = [(1, 33, 17), (7, 128, 96), (65, 33, 130), (65, 128, 17)]
GATES = [
    Case(frozen=(1,)),
    Case(ranks=(2, 5, 1), frozen=(0,)),
    Case(gate="fixed"),
    Case(ranks=(4,), gate="none"),
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("gates", GATES, ids=lambda case: f"{case.gate}-{len(case.ranks)}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(
    shape: tuple[int, int, int],
    gates: Case,
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    dropout: float,
) -> None:
    m, n, k = shape
    check(replace(gates, m=m, n=n, k=k, dtype=dtype, param_dtype=param_dtype, dropout=dropout))


def test_several_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged, "BLOCK_ELEMENTS", 40 * 96)
    check(Case(m=130, n=64, k=96, dropout=0.3, dtype=torch.float32, param_dtype=torch.float32))


def swap_gates(patch: pytest.MonkeyPatch) -> None:
    gates = merged._gates
    patch.setattr(merged, "_gates", lambda x, mixer: gates(x, mixer).flip(1).contiguous())


def forget_scaling(patch: pytest.MonkeyPatch) -> None:
    pieces = merged._pieces
    patch.setattr(merged, "_pieces", lambda *arguments: pieces(*arguments[:-1], 1.0))


def mirror_mask(patch: pytest.MonkeyPatch) -> None:
    keep_rows = merged.keep_rows
    patch.setattr(merged, "keep_rows", lambda *arguments: keep_rows(*arguments).flip(1))


def drop_softmax_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "_softmax_backward_data", lambda dg, g, dim, dtype: dg * g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", [swap_gates, forget_scaling, mirror_mask, drop_softmax_mean])
def test_budget_refuses_faults(
    fault: Callable[[pytest.MonkeyPatch], None],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(m=65, n=64, k=96, dropout=0.3, dtype=dtype, param_dtype=torch.float32)
    check(case)
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="times its budget"):
        check(case)


def test_budget_refuses_a_coarser_result() -> None:
    """A float32 result that was rounded to bfloat16 on its way is refused."""
    case = Case(m=65, n=64, k=96, dtype=torch.float32, param_dtype=torch.float32)

    def rounded(*args: object, **kwargs: object) -> Tensor:
        return mixed_lora_linear(*args, **kwargs).bfloat16().float()

    with pytest.raises(AssertionError, match="times its budget"):
        check(case, rounded)

"""Hopper's kernels against float64: in the machine for tests, and on a GPU that has them."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from fedalt_kernels import mixed_lora_linear

from . import machine
from .cases import Case
from .parity import check

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICE = "cuda" if ON_HOPPER else "cpu"
pytestmark = pytest.mark.usefixtures("poison")

BASE = Case(
    m=200, n=328, k=264, ranks=(8, 8), frozen=(1,), bias=False,
    dtype=torch.bfloat16, param_dtype=torch.float32,
)  # fmt: skip
CASES = {
    "plain": BASE,
    "bias": replace(BASE, bias=True),
    "whole tiles": replace(BASE, m=128, n=512, k=256),
    "transposed": replace(BASE, transposed=True),
    "float16": replace(BASE, dtype=torch.float16),
    "wide ranks": replace(BASE, ranks=(64, 64)),
    "all trained": replace(BASE, frozen=()),
    "second trained": replace(BASE, ranks=(5, 12, 9), frozen=(0, 2)),
    "eight adapters": replace(BASE, ranks=(16,) * 8, k=776, frozen=(0, 1, 2, 3, 4, 6)),
    "fixed gates": replace(BASE, gate="fixed", ranks=(16, 3)),
    "no gates": replace(BASE, gate="none", ranks=(20,), frozen=()),
}


DROPPED = [name for name in CASES if name != "eight adapters"]  # whose backward is another's
PARAMETERS = [(name, 0.0) for name in CASES] + [(name, 0.3) for name in DROPPED]


@pytest.mark.parametrize(("name", "dropout"), PARAMETERS)
def test_error_budget(name: str, dropout: float) -> None:
    case = replace(CASES[name], dropout=dropout)
    function = partial(mixed_lora_linear, impl="triton", schedule="hopper")
    if ON_HOPPER:
        check(case, function, least_draws=2, device=DEVICE)
    else:
        with machine.launched(machine.load(), programs=5):
            check(case, function, least_draws=1)

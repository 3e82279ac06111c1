"""Hopper's kernels against float64: in the machine for tests, and on a GPU that has them."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fedalt_kernels import mixed_lora_linear
from fedalt_kernels.adapter import Branches
from fedalt_kernels.triton import hopper
from fedalt_kernels.triton.hopper import planning, record

from . import machine
from .cases import Case, apply, build
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


def test_only_what_is_proven_serves_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.empty(8192, 4096, dtype=torch.bfloat16), torch.empty(4096, 4096).bfloat16()
    downs, ups = [torch.empty(8, 4096)] * 2, [torch.empty(4096, 8)] * 2
    branches = Branches(downs, ups, torch.empty(2, 4096), None, 1.0, 0, None)
    monkeypatch.setattr(planning, "runs_on", lambda device: True)
    monkeypatch.setattr(planning, "forward_schedule", lambda *_: "overlapped")
    monkeypatch.setattr(record, "unproven", lambda device: "not yet")
    assert not hopper.serves_forward(x, weight, branches)
    assert hopper.serves_forward(x, weight, branches._replace(schedule="hopper"))
    monkeypatch.setattr(record, "unproven", lambda device: None)
    assert hopper.serves_forward(x, weight, branches)
    assert not hopper.serves_forward(x, weight, branches._replace(schedule="split"))
    monkeypatch.setattr(planning, "forward_schedule", lambda *_: "recompute")
    assert not hopper.serves_forward(x, weight, branches)


def test_what_it_cannot_serve_is_refused_by_name() -> None:
    inputs = build(replace(BASE, dtype=torch.float32), device=DEVICE)
    reason = "it computes in bfloat16 and float16" if ON_HOPPER else "it is for sm_90"
    with pytest.raises(RuntimeError, match=f"'hopper' cannot serve this call: {reason}"):
        apply(partial(mixed_lora_linear, impl="triton", schedule="hopper"), inputs, 0.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"digest": "another"}, "this source has not passed its tests on a GPU yet"),
        ({"triton": "3.0"}, "they have not passed their tests with Triton"),
        ({"architecture": "sm_80"}, "this source has not passed"),
    ],
)
def test_the_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, str], reason: str | None
) -> None:
    monkeypatch.setattr(record, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(record, "RECORD", tmp_path / "proven.json")
    mine = {"architecture": "sm_90", "digest": record.digest(), "triton": record.release()}
    record.RECORD.write_text(json.dumps([mine | change]))
    found = record.unproven.__wrapped__(torch.device("cpu"))
    assert found is None if reason is None else found.startswith(reason)


def test_the_shipped_record_is_of_the_shipped_source() -> None:
    records = json.loads(record.RECORD.read_text())
    assert {each["digest"] for each in records} == {record.digest()}

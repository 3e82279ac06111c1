"""Which implementation serves a call, what is refused, and with which words."""

import re
import subprocess
import sys
import warnings

import pytest
import torch

from fedalt_kernels import choice, mixed_lora_linear
from fedalt_kernels.triton import tiles

from .cases import SCALING, Case, build

BF16 = Case(m=70, n=64, k=64, dtype=torch.bfloat16, param_dtype=torch.float32)
OLD_GPU = torch.device("cuda", 0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def call(case: Case, **changes: object) -> torch.Tensor:
    inputs = build(case, 0, DEVICE)
    given = {"dropout_p": case.dropout, "impl": "triton"} | changes
    return mixed_lora_linear(
        inputs.x,
        inputs.weight,
        inputs.bias,
        inputs.adapters,
        inputs.mixer,
        scaling=SCALING,
        **given,
    )


def test_a_cpu_without_the_interpreter_is_refused_with_its_cure() -> None:
    program = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch; from fedalt_kernels import MixedLoRALinear\n"
        "MixedLoRALinear(torch.nn.Linear(8, 4), impl='triton')(torch.randn(3, 8))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "RuntimeError: impl='triton' cannot run: x is on a CPU (TRITON_INTERPRET=1 runs the "
        "kernels there, very slowly); use impl='torch' or 'auto'"
    )


def test_float64_is_refused() -> None:
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16, got float64; use impl="):
        call(Case())


def test_a_weight_without_contiguous_rows_or_columns_is_refused() -> None:
    inputs = build(BF16, 0, DEVICE)
    weight = torch.empty(64, 128, dtype=torch.bfloat16, device=DEVICE)[:, ::2]
    with pytest.raises(RuntimeError, match=re.escape("strides must be 1, got (128, 2)")):
        mixed_lora_linear(inputs.x, weight, None, inputs.adapters, None, scaling=1.0, impl="triton")


def test_without_triton_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    cure = r"triton is not installed \(pip install 'fedalt\[triton\]'\); use impl='torch'"
    with pytest.raises(RuntimeError, match=cure):
        call(BF16)


@pytest.mark.parametrize(
    ("changes", "case", "reason"),
    [
        ("decode", BF16, "it serves up to 64 rows, got 70"),
        (
            "recompute",
            Case(70, 64, 64, (100, 40), dtype=torch.float16),
            "up to 128 in sum, got 140",
        ),
        ("recompute", Case(70, 64, 64, dropout=0.5, dtype=torch.float16), "it serves no dropout"),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_serve_is_refused(changes: str, case: Case, reason: str) -> None:
    case = Case(**{**vars(case), "param_dtype": torch.float32})
    message = f"schedule {changes!r} cannot serve this call: "
    with pytest.raises(RuntimeError, match=re.escape(message) + ".*" + re.escape(reason)):
        call(case, schedule=changes)


@pytest.mark.parametrize(("impl", "schedule"), [("auto", "split"), ("triton", "fast")])
def test_unknown_and_misplaced_schedules_are_refused(impl: str, schedule: str) -> None:
    with pytest.raises(ValueError, match="schedule must be one of decode, recompute, overlapped"):
        call(BF16, impl=impl, schedule=schedule)


def test_programs_that_cannot_wait_are_not_made_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "architecture", lambda device: "gfx942")
    monkeypatch.setattr(tiles, "programs", lambda device: 1)
    x = build(BF16, 0, DEVICE).x
    ranks = tiles.side_by_side([3, 3], x.dtype)
    for schedule in ("decode", "overlapped"):
        reason = tiles.unserved(schedule, x, ranks, False)
        assert reason == "programs cannot wait for one another on gfx942"
    assert tiles.forward_schedule(x[:4], build(BF16, 0, DEVICE).weight, ranks, False) == "recompute"
    assert tiles.forward_schedule(x, build(BF16, 0, DEVICE).weight, ranks, False) == "split"


def test_auto_warns_once_where_a_gpu_cannot_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnOldGpu:
        device = OLD_GPU
        dtype = torch.bfloat16

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    choice._warn_once.cache_clear()
    weight = torch.empty(4, 8)
    with pytest.warns(UserWarning, match=r"compute capability 8.0 or more, got \(7, 5\)"):
        assert choice.implementation("auto", OnOldGpu(), weight) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.implementation("auto", OnOldGpu(), weight) == "torch"


def test_an_unlisted_gpu_gets_generic_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlisted:
        major, minor = 12, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Unlisted())
    monkeypatch.setattr(torch.version, "hip", None)
    tiles.architecture.cache_clear()
    try:
        assert tiles.architecture(OLD_GPU) == "generic"
    finally:
        tiles.architecture.cache_clear()


def test_no_rows_are_served() -> None:
    inputs = build(BF16, 0, DEVICE)
    y = mixed_lora_linear(
        inputs.x[:0], inputs.weight, None, inputs.adapters, None, scaling=1.0, impl="triton"
    )
    assert y.shape == (0, 64)

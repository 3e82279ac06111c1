"""Kernels launched directly get what Triton's own way gives them; where that is unsure, it serves.

In processes of their own beside a stand-in for the driver: here kernels are the interpreter's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
BEGIN = """
import warnings
from types import SimpleNamespace

import torch
from torch import nn
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from bench import standin
from fedalt_kernels import MixedLoRALinear, plans

standin.install()
from fedalt_kernels.triton import launch

calls = []
utils = driver.active.utils
utils.launch = lambda *arguments: calls.append(arguments)
nvidia.compile_module_from_src = lambda **_: SimpleNamespace(launch=utils.launch)
utils.fill_tma_descriptor_tiled = lambda *arguments: ("map", *arguments)
utils.fill_tma_descriptor = utils.fill_tma_descriptor_tiled


def layer(dropout=0.0, n=64):
    made = MixedLoRALinear(nn.Linear(64, n), rank=4, dropout=dropout, impl="triton")
    return made.to(torch.bfloat16)


def step(made, x):
    x = x.detach().requires_grad_()
    made(x).sum().backward()
    found = calls.copy()
    calls.clear()
    return found


def settled(value):
    "A call's argument without what differs from call to call: addresses and who listens."
    if isinstance(value, (tuple, list)):
        return [settled(each) for each in value]
    if isinstance(value, torch.Tensor) or (isinstance(value, int) and value > 2**22):
        return "address"
    if isinstance(value, knobs.HookChain) or type(value).__name__ == "LazyDict":
        return None
    return value


x = torch.randn(80, 64, dtype=torch.bfloat16)
"""
SAME = """
for dropout in (0.0, 0.25):
    for n in (64, 65):  # through descriptors, and through pointers alone
        made = layer(dropout, n)
        first, second, third = (step(made, x) for _ in range(3))
        assert len(first) == len(second) >= 3  # Hopper's kernels are no more, where they serve
        assert settled(first) == settled(second) == settled(third)
        assert not any(are_direct(first))
        assert all(are_direct(second + third))
"""
FLAT = """
def flat(value):
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from flat(each)
    else:
        yield value


def are_direct(found):
    return [not any(isinstance(each, torch.Tensor) for each in flat(call)) for call in found]
"""
OTHERWISE = """
made = layer()
assert not any(are_direct(step(made, x)))
assert all(are_direct(step(made, x)))

heard = lambda *_: None
knobs.runtime.launch_enter_hook.add(heard)
assert not any(are_direct(step(made, x)))
knobs.runtime.launch_enter_hook.remove(heard)
assert all(are_direct(step(made, x)))

rows = torch.empty(81 * 64 + 1, dtype=torch.bfloat16)[1 : 80 * 64 + 1].view(80, 64)
assert rows.data_ptr() % 16
for _ in range(2):
    forward = step(made, rows)
assert not are_direct(forward)[1]  # of which x is an argument

plans.forget()
launch.KNOWN = ()
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(3):
        assert not any(are_direct(step(made, x)))
assert len(told) == 1, told
assert "launched Triton's own, slower way: ValueError: Triton" in str(told[0].message)
"""


@pytest.mark.parametrize("script", [SAME, OTHERWISE], ids=["same arguments", "otherwise"])
def test_direct_launches(script: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + FLAT + script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr

"""What the machine for tests finds: right under many orders, and every deliberate fault noticed."""

import ast
from functools import partial

import pytest
import torch

from fedalt_kernels import mixed_lora_linear, plans
from fedalt_kernels.reference import reference
from fedalt_kernels.triton.hopper import order, planning, record
from fedalt_kernels.triton.hopper.shapes import BLOCK_M, Backward

from . import machine
from .cases import Case, build, run

pytestmark = pytest.mark.usefixtures("poison")

CASE = Case(
    m=200, n=328, k=264, ranks=(8, 8), frozen=(1,), bias=False,
    dtype=torch.bfloat16, param_dtype=torch.float32,
)  # fmt: skip
SEEDS = range(5)
# file, what it says, and what it would say wrongly
FAULTS = {
    "an arrival dropped": ("ring", "count=1, pred=held | (step > 0))", "count=1, pred=False)"),
    "a slot released early": (
        "ring",
        "warpgroup_mma_wait(1, deps=(acc,)))\n        mbarrier.arrive(ring.empty.index(last)",
        "warpgroup_mma_wait(1, deps=(acc,)))\n        mbarrier.arrive(ring.empty.index(slot)",
    ),
    "too many bytes": ("forward", "(S.BLOCK_M + S.BLOCK_N) * S.BLOCK_K * 2", "S.SLOT_N * 4"),
    "too few bytes": ("forward", "(S.BLOCK_M + S.BLOCK_N) * S.BLOCK_K * 2", "S.SLOT_N * 2"),
    "a flag before its strip": (
        "makers",
        "    p_strip = p_gated + o_tall * S.STRIDE + gl.expand_dims(o_rank, 0)\n",
        "    publish(flag)\n"
        "    p_strip = p_gated + o_tall * S.STRIDE + gl.expand_dims(o_rank, 0)\n",
    ),
    "no wait for a flag": ("forward", "    wait_for(flag, 2 * S.MAKERS)\n", ""),
    "one half's flag is enough": ("forward", "wait_for(flag, 2 * S.MAKERS)", "wait_for(flag, 1)"),
    "no barrier before a flag": ("ring", "    barrier()  # without it only", "    # without it"),
    "no fence before a flag": (
        "ring",
        "    proxy_fence()\n    gl.atomic_add(flag, 1",
        "    gl.atomic_add(flag, 1",
    ),
    "no fence after a flag": ("ring", "        pass\n    proxy_fence()", "        pass"),
    "no fence before a copy out": ("blocks", "    fence_async_shared()\n    tma", "    tma"),
    "a buffer stored into too early": ("blocks", "tma.store_wait(1)", "tma.store_wait(9)"),
    "dirty counters": ("ring", "mask=o_count < length", "mask=(o_count < 2) & (o_count < length)"),
    "counters cleaned by the wrong one": (
        "ring",
        "left == 2 * gl.num_programs(0) - 1",
        "left == gl.num_programs(0) - 1",
    ),
    "a wait too few": (
        "sums",
        "    total = warpgroup_mma_wait(0, deps=(acc,))",
        "    total = warpgroup_mma_wait(1, deps=(acc,))",
    ),
    "an element never written": ("blocks", "(target, staging, right,", "(target, staging, left,"),
    "sums before the strip": (
        "backward",
        "wait_for(counts + 2, 2 * tiles_m * S.COUNT)",
        "wait_for(counts + 2, 0)",
    ),
    "a share added too early": ("sums", "== shares - 1", "== shares - 2"),
    "the alias trap": ("ring", "        last = slot + 0\n", ""),
}  # fmt: skip


def _passes(kernels: machine.launching.Kernels, case: Case, seeds: range) -> None:
    inputs = build(case)
    truth = run(reference, inputs.in_float64(), case.dropout)
    function = partial(mixed_lora_linear, impl="triton", schedule="hopper")
    bits = []
    for seed in seeds:
        plans.forget()
        with machine.launched(kernels, seed=seed, programs=3):
            got = run(function, inputs, case.dropout)
        for name, value in got.items():
            error = (value.double() - truth[name]).norm() / truth[name].norm()
            assert error < 6e-3, f"{name}: {error:.1e} under seed {seed}"
        bits.append(got)
    for other in bits[1:]:
        assert all(torch.equal(bits[0][name], value) for name, value in other.items())


@pytest.fixture(autouse=True)
def early_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shares of each sum over tokens, the first ones as soon as the makers have begun."""

    def ordered(m: int, programs: int, shape: Backward) -> dict[str, int]:
        makers = -(-m // BLOCK_M) * shape.MAKERS
        given = order.order_of(m, programs, shape)
        return given | {"slack": makers, "start": makers, "block": 2, "early": 4}

    monkeypatch.setattr(order, "CHUNK", 128)
    monkeypatch.setattr(planning, "order_of", ordered)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_order_gives_the_same_bits(dropout: float) -> None:
    case = Case(**vars(CASE) | {"m": 400, "dropout": dropout})
    _passes(machine.load(), case, SEEDS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_deliberate_fault_is_noticed(name: str) -> None:
    kernels = machine.load(FAULTS[name])
    with pytest.raises((AssertionError, TypeError, AttributeError)):
        _passes(kernels, CASE, range(8))


def test_no_loop_carries_a_bare_alias() -> None:
    """``last = slot`` would keep the value from before the loop."""
    for name in record.SOURCES:
        tree = ast.parse((record.FOLDER / name).read_text(encoding="utf-8"))
        loops = [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While)]
        assert not [
            (name, node.lineno)
            for loop in loops
            for node in ast.walk(loop)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name)
        ]

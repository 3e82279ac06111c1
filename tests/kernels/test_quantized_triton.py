"""Quantized base weights in the Triton kernels, in the interpreter or on a GPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fedalt_kernels import Fp8Linear, MixedLoRALinear, fused, mixed_lora_linear, weights
from fedalt_kernels.triton import tiles

from .cases import Case, build, run
from .quantizing import STORAGES, check, quantize, triple

pytestmark = pytest.mark.usefixtures("poison")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# In the interpreter a tile of decode is 32 wide: half a block, two blocks, ragged columns.
DECODE = [(64, 64), (16, 80), (16, 72)]
BASE = Case(m=33, n=40, k=64, ranks=(3, 5), frozen=(1,), param_dtype=torch.float32)


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


@pytest.mark.parametrize(("block", "k"), DECODE)
@pytest.mark.parametrize("number", range(len(STORAGES)), ids=STORAGES)
def test_decode_reads_the_storage(
    number: int, block: int, k: int, written: list[tuple[int, ...]]
) -> None:
    if not STORAGES[number].endswith("nf4") and block == 64:
        pytest.skip("rows have no blocks")
    inputs = build(replace(BASE, k=k))
    assert weights.octets(quantize(inputs.weight, STORAGES[number], block)) is not None or k % block
    case = replace(BASE, k=k, dtype=DTYPES[(number + k // 8) % 3])
    if k % block:
        k = k // block * block
        case = replace(case, k=k, n=37)
    check(case, STORAGES[number], forced("decode"), 2, block, DEVICE)
    assert set(written) <= {(case.n, case.k)}
    assert len(written) == 2  # for the backward of each draw, none for its forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_decode_in_every_dtype(storage: str, dtype: torch.dtype) -> None:
    check(replace(BASE, m=16, dtype=dtype, bias=False), storage, forced("decode"), 4, 16, DEVICE)


@pytest.mark.parametrize(("block", "k"), [(16, 83), (32, 80), (64, 34)])
@pytest.mark.parametrize("storage", ["nf4", "nested nf4"])
def test_decode_of_blocks_that_cross_rows(
    storage: str, block: int, k: int, written: list[tuple[int, ...]]
) -> None:
    """They are written out first, in the forward as well."""
    case = replace(BASE, m=20, n=33, k=k, dtype=torch.bfloat16)
    check(case, storage, forced("decode"), 2, block, DEVICE)
    assert written == [(33, k)] * 4


@pytest.mark.parametrize("schedule", ["recompute", "overlapped", "split", "expand"])
@pytest.mark.parametrize("number", range(len(STORAGES)), ids=STORAGES)
def test_other_schedules(number: int, schedule: str) -> None:
    dropout = 0.3 if schedule in ("split", "expand") else 0.0
    case = replace(BASE, m=70, dropout=dropout, dtype=DTYPES[(number + len(schedule)) % 3])
    check(case, STORAGES[number], forced(schedule), 1, 16, DEVICE)


@pytest.mark.parametrize("k", [83, 80])
def test_odd_shapes_of_any_schedule(k: int) -> None:
    case = replace(BASE, m=70, n=73, k=k, frozen=(0,), bias=False, dtype=torch.float16)
    check(case, "nested nf4", forced(None), 1, 16, DEVICE)


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


def test_layers_that_share_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = []
    for n in (64, 32):
        base = Fp8Linear.from_linear(nn.Linear(64, n)).to(DEVICE)
        layers.append(MixedLoRALinear(base, 4, dropout=0.0, impl="triton"))
        nn.init.normal_(layers[-1].individual.b)
    passes = []
    project = fused.project
    monkeypatch.setattr(
        fused,
        "project",
        lambda x, down, *rest: passes.append(down.shape[0]) or project(x, down, *rest),
    )
    monkeypatch.setattr(tiles, "forward_schedule", lambda *_: "split")
    x = torch.randn(70, 64, device=DEVICE)
    expected = [layer(x) for layer in layers]
    MixedLoRALinear.share_input(layers)
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
    assert passes == [1, 1, 2]

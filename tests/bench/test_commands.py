"""``python -m bench`` where there is no GPU: what it models, what it refuses, and how."""

import json

import pytest
import torch

from bench import overhead, roofline, tune
from bench.__main__ import main
from bench.cases import Case, Q, in_order, schedules
from fedalt.config.schema import Config
from fedalt_kernels import fused_backward
from fedalt_kernels.triton import decode, reduce, tiles
from fedalt_kernels.triton.launch import Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what is said without a GPU")


def test_the_model_counts_with_the_kernels_own_figures() -> None:
    assert roofline.SLICES == decode.SLICES
    assert roofline.SHARES == reduce.MOST_SHARES
    assert roofline.MOST_JOINT_RANKS == fused_backward.MOST_JOINT_RANKS
    assert tiles.HOPPER["recompute"]["half"].n == roofline.RECOMPUTE_COLUMNS
    assert roofline.ROWS_OF["overlapped"] == tiles.HOPPER["overlapped_backward"]["half"].m
    assert roofline.ROWS_OF["split"] == tiles.HOPPER["spread"]["half"].m


@pytest.mark.parametrize("schedule", ["overlapped", "split", "expand"])
@pytest.mark.parametrize(("rank", "dropout"), [(8, 0.0), (64, 0.0), (8, 0.1)])
def test_the_model_counts_every_launch(
    schedule: str, rank: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches of our kernels, and products of PyTorch beside."""
    launches = []
    call = Launch.__call__
    monkeypatch.setattr(
        Launch,
        "__call__",
        lambda launch, *tensors: launches.append(launch) or call(launch, *tensors),
    )
    from fedalt_kernels import Adapter, mixed_lora_linear

    k, n = 32, 32
    x = torch.randn(70, k, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    shapes = (rank, k), (n, rank), (2, k)
    a, b, mixer = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in shapes)
    frozen = Adapter(a.detach().clone(), b.detach().clone())
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=DEVICE)
    y = mixed_lora_linear(
        x,
        weight,
        None,
        [Adapter(a, b), frozen],
        mixer,
        scaling=1.0,
        dropout_p=dropout,
        impl="triton",
        schedule=schedule,
    )
    y.sum().backward()
    products = 2 if schedule == "expand" else 0
    modelled = roofline.ours(Case(Q, 8192, rank, "both", dropout), schedule)
    assert len(launches) + products == len(modelled)


def test_goals_come_first_and_no_case_twice() -> None:
    cases = in_order()
    assert len(cases) == len(set(cases))
    assert cases[0] == Case(Q, 8192, 8, "forward")
    assert schedules(Case(Q, 16, 8, "forward"))[0] == "decode"


def test_a_better_device_is_never_slower() -> None:
    case = Case(Q, 8192, 8, "both", 0.05)
    slow, fast = roofline.Ceilings(), roofline.Ceilings(5e12, 900e12, 20e12, 2.0)
    for schedule in schedules(case):
        launches = roofline.ours(case, schedule)
        assert roofline.estimate(launches, fast).time_us < roofline.estimate(launches, slow).time_us


def test_roofline_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline"]) == 0
    assert "| Llama-2-7B q | 8192 | 4096 | 4096 | 8 |" in capsys.readouterr().out


@NO_GPU
@pytest.mark.parametrize("command", ["kernels", "model", "tune", "gpu"])
def test_what_needs_a_gpu_is_refused_in_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command]) == 2
    assert capsys.readouterr().err == (
        "bench: no CUDA device: run this on a machine with an NVIDIA GPU\n"
    )


def test_overhead_refuses_bad_input_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overhead", "--data", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: nowhere: no such folder")
    assert error.count("\n") == 1
    assert main(["overhead", "-c", "train.batch_size=0"]) == 2
    assert "train.batch_size must be at least 1, got 0" in capsys.readouterr().err


def test_overhead_has_a_pair_of_times_for_every_round_but_the_last(tiny_config: Config) -> None:
    pairs = overhead.measure(tiny_config)
    assert len(pairs) == tiny_config.rounds - 1
    assert all(seconds.cpu > 0 for pair in pairs for seconds in pair)


def test_search_finds_the_fastest_neighbour() -> None:
    start = tiles.Tile(64, 128, 64, 3, 4)

    def time_us(tile: tiles.Tile) -> float:
        return abs(tile.m - 128) + abs(tile.stages - 5) + 1.0

    best, fastest = tune.search(start, time_us, lambda: False)
    assert (best.m, best.stages, fastest) == (128, 5, 1.0)


def test_tuned_tiles_go_before_the_table(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpu.json"
    found = {"contract": {"half": tiles.Tile(64, 32, 32, 2, 4)}}
    tune.write_tiles(path, {"command": "test"}, found)
    assert json.loads(path.read_text())["about"] == {"command": "test"}
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    tiles.tuned.cache_clear()
    try:
        x = torch.empty(32, 32, dtype=torch.bfloat16)
        tile, _ = tiles.tile_for("contract", tiles.side_by_side([8, 8], x.dtype), x)
        assert tile == (64, 32, 32, 2, 4)
    finally:
        tiles.tuned.cache_clear()

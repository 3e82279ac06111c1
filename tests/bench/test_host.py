"""``python -m bench host`` where there is no GPU: its stand-in's launches, its times, two trees."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import fedalt_kernels
from bench import host
from bench.__main__ import main
from bench.worker import Failed, Worker

pytest.importorskip("triton", reason="the stand-in is a driver of Triton's")

# What a training layer's call launches: our kernels, and PyTorch's operators.
LAUNCHES = {
    "dropout 0.0, forward": "_pack 1, _overlapped 1",
    "dropout 0.05, forward": "_pack 1, _overlapped 1 and randint 1",
    "dropout 0.0, forward and backward": (
        "_pack 1, _overlapped 1, _overlapped_backward 1, _reduce 1"
    ),
    "dropout 0.05, forward and backward": (
        "_pack 1, _overlapped 1, _mask_words 1, _spread 1, _contract 1, _reduce 1 and randint 1"
    ),
}
# Launches everything twice and spends 20 ms of its thread, a hundred times what a call takes: its
# launches are a fact, but a factor of two in time could be a busy machine's.
SLOWER = """
import time

_once = MixedLoRALinear.forward


def _slower(self, x):
    until = time.thread_time() + 0.02
    while time.thread_time() < until:
        pass
    return _once(self, x), _once(self, x)


MixedLoRALinear.forward = lambda self, x: _slower(self, x)[0]
"""


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever these tests run, the processes that measure see no GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_launches_are_counted_and_times_are_of_two_trees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "fedalt_kernels"
    shutil.copytree(Path(fedalt_kernels.__file__).parent, package)
    with open(package / "layer.py", "a", encoding="utf-8") as layer:
        layer.write(SLOWER)

    rows = host.run(["layer"], rounds=3, against=str(tmp_path), out=tmp_path)
    printed = capsys.readouterr().out
    for case, launches in LAUNCHES.items():
        assert f"- a layer, {case}: now {launches}; before " in printed
    for row in rows:
        assert 0 < row["p20"] <= row["ours µs"] <= row["p80"]
        if row["direction"] == "forward":
            assert row["before: Triton launches"] == 2 * row["Triton launches"]
            assert row["before: PyTorch launches"] == 2 * row["PyTorch launches"]
        assert row["before µs"] > 20_000
        assert row["now / before"] < 0.5
        assert row["ours / plain"] > 1
    written = json.loads(next(tmp_path.glob("*/host.json")).read_text(encoding="utf-8"))
    assert written["rows"] == rows
    assert written["about"]["before"] == str(tmp_path)


def test_a_profile_is_a_tree_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    rows = host.run(["decode"], rounds=1, profile=True)
    assert [row["Triton launches"] for row in rows] == [1]
    lines = capsys.readouterr().out.splitlines()
    files = next(line for line in lines if line.startswith("How often it enters each file"))
    assert files.count(",") + 1 == rows[0]["files"]
    whole = next(line for line in lines if line.endswith("  the call"))
    inside = next(line for line in lines if "    MixedLoRALinear.forward (" in line)
    assert 0 < float(inside.split()[0]) <= float(whole.split()[0]) < math.inf


def test_a_commit_is_taken_from_git_and_no_trace_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    source = tmp_path / "fedalt_kernels" / "layer.py"
    source.parent.mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for text in ("older\n", "newer\n"):
        source.write_text(text, encoding="utf-8")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", text], check=True)
    monkeypatch.setattr(host, "ROOT", tmp_path)
    with host.tree_of("HEAD~1") as tree:
        assert (tree / "fedalt_kernels" / "layer.py").read_text(encoding="utf-8") == "older\n"
    assert not tree.exists()
    assert source.read_text(encoding="utf-8") == "newer\n"


def test_what_cannot_be_measured_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["host", "--against", "no-such-commit"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: --against no-such-commit: ")
    assert error.count("\n") == 1


def test_a_worker_that_dies_leaves_its_reason() -> None:
    worker = Worker("bench.nowhere", {}, {**os.environ, "PYTHONPATH": str(host.ROOT)})
    with pytest.raises(Failed, match=r"No module named bench\.nowhere$"):
        worker.answer()
    worker.end()

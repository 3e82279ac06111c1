"""Disks that are full, read-only or have lost files: one line, and the run can go on."""

import errno
import os
import resource
from pathlib import Path

import pytest

import fedalt
from fedalt.cli import main
from fedalt.errors import InputError
from tests.run.test_run import cut_short, quick, record_of


def test_metrics_that_lost_finished_rounds_are_refused(tiny_config):
    config = quick(tiny_config, rounds=1)
    fedalt.Federation(config).run()
    path = Path(config.out, "metrics.jsonl")
    size = path.stat().st_size
    os.truncate(path, size - 10)
    with pytest.raises(InputError, match=f"{size - 10} bytes, the finished rounds wrote {size}"):
        fedalt.Federation(config).run(resume=True)
    assert path.stat().st_size == size - 10


def refused(out, capsys):
    """The one line with which a resume ends, with exit status 2."""
    capsys.readouterr()
    assert main(["run", "--out", str(out), "--resume"]) == 2
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if not line.startswith("round ")]
    lines = [line for line in lines if "Loading weights" not in line and " -> " not in line]
    assert len(lines) == 1, errors
    return lines[0]


@pytest.fixture
def uncut(tiny_config, tmp_path):
    config = quick(tiny_config, rounds=3, out=tmp_path / "uncut")
    fedalt.Federation(config).run()
    return record_of(Path(config.out))


OBSTACLES = (
    "latest",
    "metrics.jsonl",
    "times.jsonl",
    "results.json",
    "report",
)


@pytest.mark.parametrize("name", OBSTACLES)
def test_whatever_cannot_be_written_ends_in_one_line_and_the_run_can_go_on(
    tiny_config, uncut, name, capsys
):
    """What stands in the way is of the wrong kind, which stops even a user who may write all."""
    config = quick(tiny_config, rounds=3)
    out = Path(config.out)
    cut_short(config)
    path, aside = out / name, out.with_name("aside")
    if path.exists():
        path.rename(aside)
    if name == "report":
        path.write_text("in the way")
    else:
        path.mkdir()
    line = refused(out, capsys)
    assert line.startswith("fedalt: ")
    assert str(path) in line
    assert "make it writable and go on with --resume" in line
    path.rmdir() if path.is_dir() else path.unlink()
    if aside.exists():
        aside.rename(path)
    assert main(["run", "--out", str(out), "--resume"]) == 0
    assert record_of(out) == uncut


def test_a_resume_whose_checkpoints_are_gone_is_refused_before_anything_is_lost(
    tiny_config, uncut, capsys
):
    config = quick(tiny_config, rounds=3)
    out = Path(config.out)
    cut_short(config)
    (out / "checkpoints").rename(out.with_name("aside"))
    assert f"{out / 'latest'}: names a checkpoint that is gone" in refused(out, capsys)
    out.with_name("aside").rename(out / "checkpoints")
    assert main(["run", "--out", str(out), "--resume"]) == 0
    assert record_of(out) == uncut


@pytest.mark.parametrize("limit", [200, 4000, 6000])
def test_files_that_may_not_grow_end_in_one_line_and_the_run_can_go_on(
    tiny_config, uncut, limit, capsys
):
    """RLIMIT_FSIZE: the config, the states or the metrics hit it first."""
    config = quick(tiny_config, rounds=3)
    out = Path(config.out)
    cut_short(config)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        line = refused(out, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"fedalt: {out}" in line
    assert line.endswith(
        "cannot write: File too large; allow larger files (ulimit -f) and go on with --resume"
    )
    assert fedalt.load_client(out, "bob")
    assert main(["run", "--out", str(out), "--resume"]) == 0
    assert record_of(out) == uncut


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("last", [".safetensors", "manifest.json", "metrics.jsonl"])
def test_a_full_or_read_only_disk_ends_in_one_line_and_the_run_can_go_on(
    tiny_config, uncut, code, last, capsys, monkeypatch
):
    config = quick(tiny_config, rounds=3)
    out = Path(config.out)
    cut_short(config)
    write, sync = Path.write_bytes, os.fsync

    def full(path):
        if str(path).endswith(last):
            raise OSError(code, os.strerror(code), str(path))

    def write_bytes(path, content):
        full(path)
        return write(path, content)

    def fsync(descriptor):
        full(os.readlink(f"/proc/self/fd/{descriptor}"))
        return sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        patch.setattr(os, "fsync", fsync)
        line = refused(out, capsys)
    cure = "free some space" if code == errno.ENOSPC else "make it writable"
    assert f"{last}: cannot write: {os.strerror(code)}; {cure} and go on with --resume" in line
    assert main(["run", "--out", str(out), "--resume"]) == 0
    assert record_of(out) == uncut


def test_a_line_of_times_that_a_full_disk_cut_short_does_not_spoil_the_report(tiny_config):
    config = quick(tiny_config, rounds=3)
    cut_short(config)
    times = Path(config.out, "times.jsonl")
    whole = times.read_text()
    times.write_text(whole + '{"round": 2, "pha')
    fedalt.Federation(config).run(resume=True)
    assert times.read_text().startswith(whole + '{"round": 2, "phase"')

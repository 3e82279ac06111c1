"""Checkpoints: whole or absent, checked when read, the oldest dropped."""

import contextlib
import os

import pytest
import torch

from fedalt import checkpoint as ckpt
from fedalt.errors import InputError


def federation(number, keeps_local=False):
    used = {name: {"a": torch.full((2, 3), float(number))} for name in ("ann", "bob ü")}
    following = {name: {"a": state["a"] + 1} for name, state in used.items()}
    return ckpt.Checkpoint(number, used, following if keeps_local else used, {"metrics_bytes": 7})


def equal(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[c][n], right[c][n]) for c in left for n in left[c]
    )


@pytest.mark.parametrize("keeps_local", [False, True])
def test_a_checkpoint_reads_back_exactly(tmp_path, keeps_local):
    saved = federation(3, keeps_local)
    path = ckpt.save_checkpoint(tmp_path, saved, keep=2)
    read = ckpt.load_latest(tmp_path)
    assert (read.round, read.record) == (3, {"metrics_bytes": 7})
    assert equal(read.used, saved.used)
    assert equal(read.next, saved.next)
    assert (path / "next").exists() == keeps_local
    assert (tmp_path / "latest").read_text() == "round-0003\n"


def test_only_the_newest_are_kept(tmp_path):
    for number in range(4):
        ckpt.save_checkpoint(tmp_path, federation(number), keep=2)
    names = [path.name for path in ckpt.list_checkpoints(tmp_path)]
    assert names == ["round-0002", "round-0003"]


def test_no_checkpoint_yet(tmp_path):
    assert ckpt.load_latest(tmp_path) is None


STAGES = ("_write_synced", "_sync_folder", "rename", "write_atomic", "rmtree")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("call", range(5))
def test_a_save_cut_short_anywhere_leaves_the_one_before_or_the_new_one(
    tmp_path, monkeypatch, stage, call
):
    """Every step of a save fails in turn, as a kill would have it end there."""
    ckpt.save_checkpoint(tmp_path, federation(0), keep=1)
    owner = {"rename": os, "rmtree": ckpt.shutil}.get(stage, ckpt)
    original, calls = getattr(owner, stage), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, stage, failing)
    with contextlib.suppress(KeyboardInterrupt):
        ckpt.save_checkpoint(tmp_path, federation(1), keep=1)
    monkeypatch.undo()
    survivor = ckpt.load_latest(tmp_path)
    assert survivor.round in (0, 1)
    assert equal(survivor.used, federation(survivor.round).used)
    ckpt.save_checkpoint(tmp_path, federation(2), keep=1)
    assert ckpt.load_latest(tmp_path).round == 2


def damage_flip(path):
    content = bytearray((path / "clients" / "ann.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "clients" / "ann.safetensors").write_bytes(content)


def damage_cut(path):
    file = path / "clients" / "ann.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_flip, r"ann.safetensors: damaged"),
        (damage_cut, r"ann.safetensors: damaged"),
        (lambda path: (path / "clients" / "ann.safetensors").unlink(), "ann.safetensors: missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json: missing or not"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json: missing or not"),
    ],
)
def test_damage_is_named_and_the_one_before_offered(tmp_path, damage, message):
    ckpt.save_checkpoint(tmp_path, federation(1), keep=2)
    damage(ckpt.save_checkpoint(tmp_path, federation(2), keep=2))
    with pytest.raises(InputError, match=message) as caught:
        ckpt.load_latest(tmp_path)
    assert "to go back to round-0001" in str(caught.value)
    assert "\n" not in str(caught.value)

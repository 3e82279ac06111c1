"""Checkpoints: whole or absent, checked when read, the oldest dropped."""

import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedalt
from fedalt.errors import InputError
from fedalt.store import checkpoint as ckpt
from tests.run.test_run import quick

RECORD = {"metrics_bytes": 7, "clients": ["ann", "bob ü"]}


def state_of(number):
    return {"a": torch.full((2, 3), float(number)), "b": torch.arange(4) + number}


def save(run_dir, number, keep=2, keeps_local=False):
    draft = ckpt.Draft(run_dir, number)
    for name in RECORD["clients"]:
        draft.put("dropped", name, state_of(-1))
        draft.put(ckpt.CLIENTS, name, state_of(-1))  # put again: the later one counts
        draft.put(ckpt.CLIENTS, name, state_of(number))
        if keeps_local:
            draft.put(ckpt.NEXT, name, state_of(number + 10))
    draft.drop("dropped")
    return draft.commit(RECORD, keep)


def holds(saved, number, group=ckpt.CLIENTS):
    read = [saved.state(group, name).read() for name in RECORD["clients"]]
    return all(torch.equal(r[n], t) for r in read for n, t in state_of(number).items())


@pytest.mark.parametrize("keeps_local", [False, True])
def test_a_checkpoint_reads_back_exactly(tmp_path, keeps_local):
    save(tmp_path, 3, keeps_local=keeps_local)
    read = ckpt.load_latest(tmp_path)
    assert (read.round, read.record) == (3, RECORD)
    assert holds(read, 3)
    following = read.next("bob ü").read()
    assert torch.equal(following["a"], state_of(13 if keeps_local else 3)["a"])
    assert {path.name for path in read.path.iterdir()} == (
        {"manifest.json", "clients"} | ({"next"} if keeps_local else set())
    )
    assert (tmp_path / "latest").read_text() == "round-0003\n"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
    for number in range(4):
        save(tmp_path, number, keep=keep)
    names = [path.name for path in ckpt.list_checkpoints(tmp_path)]
    assert names == [f"round-000{number}" for number in range(4 - keep, 4)]


def test_no_checkpoint_yet(tmp_path):
    assert ckpt.load_latest(tmp_path) is None


def test_where_folders_cannot_be_opened_files_alone_are_seen_to_disk(tmp_path, monkeypatch):
    """As on Windows."""
    synced, fsync = set(), os.fsync

    def refuse(descriptor):
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise PermissionError(errno.EACCES, "Permission denied")
        synced.add(found.st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        save(tmp_path / "posix", 0)
    monkeypatch.setattr(ckpt, "_FOLDERS_OPEN", False)
    assert holds(save(tmp_path / "windows", 1), 1)
    files = [path for path in (tmp_path / "windows").rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {path.stat().st_ino for path in files} <= synced


STEPS = (
    (os, "open"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (shutil, "rmtree"),
    (Path, "mkdir"),
    (Path, "write_bytes"),
)
"""All by which a save touches the disk."""


@contextlib.contextmanager
def at_step(stop, act):
    """``act`` in place of step ``stop`` of all that touch the disk; a write is half done then."""
    count = [0]

    def wrapped(original):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] - 1 == stop:
                if original.__name__ == "write_bytes":
                    original(args[0], args[1][: len(args[1]) // 2])
                with contextlib.suppress(*[OSError] * bool(kwargs.get("ignore_errors"))):
                    act()
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STEPS:
            patch.setattr(owner, name, wrapped(getattr(owner, name)))
        yield count


def steps_of_a_save(folder):
    save(folder, 0, keep=1)
    with at_step(-1, lambda: None) as count:
        save(folder, 1, keep=1)
    return count[0]


def whole_after(folder):
    """What is left after a save of round 1 was cut short is one of the two, and saves go on."""
    survivor = ckpt.load_latest(folder)
    assert holds(survivor, survivor.round)
    save(folder, 2, keep=1)
    assert [path.name for path in ckpt.list_checkpoints(folder)] == ["round-0002"]
    assert holds(ckpt.load_latest(folder), 2)
    return survivor.round


def test_a_save_that_ends_at_any_step_leaves_the_one_before_or_the_new_one(tmp_path):
    def act():
        raise KeyboardInterrupt

    survivors = []
    for step in range(steps_of_a_save(tmp_path / "counted")):
        save(tmp_path / str(step), 0, keep=1)
        with at_step(step, act), pytest.raises(KeyboardInterrupt):
            save(tmp_path / str(step), 1, keep=1)
        survivors.append(whole_after(tmp_path / str(step)))
    assert len(survivors) > 15
    assert survivors == sorted(survivors)  # the old one up to some step, the new one from there
    assert set(survivors) == {0, 1}


def test_a_process_killed_at_any_step_of_a_save_leaves_the_one_before_or_the_new_one(tmp_path):
    """SIGKILL, in a child process, at every step."""
    for step in range(steps_of_a_save(tmp_path / "counted")):
        folder = tmp_path / str(step)
        save(folder, 0, keep=1)
        child = os.fork()
        if not child:
            with at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                save(folder, 1, keep=1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        whole_after(folder)


def test_a_disk_that_fails_at_any_step_is_told_in_one_line_and_leaves_a_whole_checkpoint(tmp_path):
    def act():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    told = []
    for step in range(steps_of_a_save(tmp_path / "counted")):
        folder = tmp_path / str(step)
        save(folder, 0, keep=1)
        try:
            with at_step(step, act):
                save(folder, 1, keep=1)
        except InputError as error:
            told.append(str(error))
        whole_after(folder)
    assert len(told) > 15
    for line in told:
        assert line.startswith(str(tmp_path))
        assert line.endswith(
            "cannot write: No space left on device; free some space and go on with --resume"
        )
        assert "\n" not in line


def test_a_flipped_bit_in_any_byte_of_any_file_is_noticed(tmp_path):
    """One bit of every byte, and in the manifest the bit between capital and small letters too."""
    path = save(tmp_path, 1).path
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        content = file.read_bytes()
        for place in range(len(content)):
            masks = {1 << place % 8} | ({0x20} if file.name == "manifest.json" else set())
            for mask in masks:
                changed = bytearray(content)
                changed[place] ^= mask
                file.write_bytes(changed)
                with pytest.raises(InputError, match=f"{file.name}: "):
                    ckpt.load_checkpoint(path)
        file.write_bytes(content)
    assert holds(ckpt.load_checkpoint(path), 1)


@pytest.mark.parametrize("name", ["manifest.json", "clients/ann.safetensors"])
@pytest.mark.parametrize("left", [0, 1, 0.5, -1])
def test_a_truncated_file_is_named(tmp_path, name, left):
    file = save(tmp_path, 1).path / name
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content)) if left == 0.5 else left])
    with pytest.raises(InputError, match=rf"{name}: (damaged|missing or not readable)"):
        ckpt.load_latest(tmp_path)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def pickled(path, name):
    (path / "clients" / name).write_bytes(pickle.dumps(Trap(path.parent / "sprung")))


def resealed(path):
    """Put what lies there into the manifest, as someone would who knows how it is made."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    for name in manifest["files"]:
        manifest["files"][name] = ckpt.hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "manifest.json").write_bytes(ckpt._sealed(manifest))


DAMAGE = {
    "gone": (
        lambda path: (path / "clients" / "ann.safetensors").unlink(),
        "clients/ann.safetensors: missing",
    ),
    "extra": (
        lambda path: (path / "notes.txt").write_text("mine"),
        "notes.txt: foreign",
    ),
    "pt": (lambda path: pickled(path, "ann.pt"), r"clients/ann\.pt: foreign"),
    "bin": (lambda path: pickled(path, "ann.bin"), r"clients/ann\.bin: foreign"),
    "pkl": (lambda path: pickled(path, "ann.pkl"), r"clients/ann\.pkl: foreign"),
    "pickled": (
        lambda path: pickled(path, "ann.safetensors"),
        r"clients/ann\.safetensors: damaged",
    ),
    "list": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json: missing or"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json: missing or"),
    "binary": (
        lambda path: (path / "manifest.json").write_bytes(b"\xff\x00"),
        "manifest.json: missing or",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_the_one_before_offered(tmp_path, case):
    damage, message = DAMAGE[case]
    save(tmp_path, 1)
    newest = save(tmp_path, 2).path
    damage(newest)
    with pytest.raises(InputError, match=message) as caught:
        ckpt.load_latest(tmp_path)
    assert str(caught.value).endswith(f"; remove {newest} to go back to round-0001")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoints" / "sprung").exists()
    shutil.rmtree(newest)
    assert holds(ckpt.load_latest(tmp_path), 1)


def test_a_pickle_under_a_sound_seal_is_never_unpickled(tmp_path):
    path = save(tmp_path, 1).path
    pickled(path, "ann.safetensors")
    resealed(path)
    with pytest.raises(InputError, match=r"ann\.safetensors: not a readable safetensors file"):
        ckpt.load_checkpoint(path).used("ann")
    assert not (path.parent / "sprung").exists()


def test_the_offer_is_a_whole_one_or_none(tmp_path):
    paths = [save(tmp_path, number, keep=3).path for number in range(3)]
    for path in paths[1:]:
        (path / "clients" / "ann.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        ckpt.load_latest(tmp_path)
    assert str(caught.value).endswith(f"remove {paths[1]} and {paths[2]} to go back to round-0000")
    (paths[0] / "clients" / "ann.safetensors").unlink()
    with pytest.raises(InputError, match="start again under another --out"):
        ckpt.load_latest(tmp_path)


def test_a_renamed_checkpoint_is_refused(tmp_path):
    path = save(tmp_path, 1).path
    path.rename(path.with_name("round-0007"))
    with pytest.raises(InputError, match="round-0007: renamed, its manifest is of round 1"):
        ckpt.load_latest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 here and was 1"),
        ({"method": "fedit"}, "method is 'fedalt' here and was 'fedit'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tiny_config, tmp_path, change, message):
    config = quick(tiny_config)
    other = replace(quick(tiny_config, out=tmp_path / "other"), **change)
    for one in (config, other):
        fedalt.Federation(one).run()
    stranger = Path(config.out, "checkpoints", "round-0002")
    shutil.rmtree(stranger)
    shutil.copytree(Path(other.out, "checkpoints", "round-0002"), stranger)
    for use in (
        lambda: fedalt.Federation(config).run(resume=True),
        lambda: fedalt.load_client(config.out, "bob"),
    ):
        with pytest.raises(InputError, match=message):
            use()
    shutil.rmtree(stranger)
    fedalt.Federation(config).run(resume=True)
    assert (stranger / "manifest.json").exists()


def test_a_checkpoint_of_the_same_settings_over_other_data_is_refused(
    tiny_config, tiny_data, tmp_path
):
    config = quick(tiny_config, rounds=1)
    fedalt.Federation(config).run()
    first = tmp_path / "first"
    Path(config.out).rename(first)
    path = tiny_data / "bob" / "test.jsonl"
    path.write_text(path.read_text().replace("say 1", "say 7"))
    fedalt.Federation(config).run()
    mine = Path(config.out, "checkpoints", "round-0001")
    shutil.rmtree(mine)
    shutil.copytree(first / "checkpoints" / "round-0001", mine)
    with pytest.raises(InputError, match="the data of bob is not what it was"):
        fedalt.Federation(config).run(resume=True)

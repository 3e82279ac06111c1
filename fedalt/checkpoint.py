"""Atomic checkpoints and exact resume.

``checkpoints/round-0007/`` holds ``clients/ID.safetensors``, what each client uses, ``next/`` where
the next round starts from something else, and ``manifest.json`` with a SHA-256 of every file, which
is written last. The folder is made under another name, synced to disk and renamed, so under its own
name it is whole, whenever the process is killed. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from fedalt.errors import InputError

States = Mapping[str, Mapping[str, Tensor]]
_NAME = re.compile(r"round-(\d{4,})")
_MANIFEST = "manifest.json"
DRAFT = ".draft-"
"""Begins the name of what a kill may leave half written; it counts as nothing."""


@dataclass(frozen=True)
class Checkpoint:
    """The federation after a round.

    Attributes:
        round: the last finished round; 0 is before any training.
        used: by client id, the adapters the client is evaluated and used with.
        next: by client id, the adapters the next round starts from.
        record: what the run wrote beside them, such as fingerprints and the size of its metrics.
    """

    round: int
    used: States
    next: States
    record: Mapping[str, Any]


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``checkpoint`` whole or not at all, then remove all but the ``keep`` newest."""
    root = run_dir / "checkpoints"
    root.mkdir(exist_ok=True)
    final = root / f"round-{checkpoint.round:04d}"
    draft = root / f"{DRAFT}{final.name}"
    shutil.rmtree(draft, ignore_errors=True)
    files = _state_files(checkpoint)
    for name, content in files.items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        _write_synced(draft / name, content)
    manifest = {
        "round": checkpoint.round,
        "clients": list(checkpoint.used),
        "record": dict(checkpoint.record),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    _write_synced(draft / _MANIFEST, json.dumps(manifest, indent=1).encode())
    for folder in {path.parent for path in draft.rglob("*")}:
        _sync_folder(folder)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(draft, final)
    _sync_folder(root)
    write_atomic(run_dir / "latest", final.name + "\n")
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    root = run_dir / "checkpoints"
    found = [path for path in root.glob("round-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round-")))


def load_latest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None where there is none yet.

    Raises:
        InputError: it is damaged; the message names the file and the checkpoint before it.
    """
    found = list_checkpoints(run_dir)
    if not found:
        return None
    try:
        return load_checkpoint(found[-1])
    except InputError as error:
        cure = f"remove {found[-1]} to go back to {found[-2].name}" if found[1:] else "start again"
        raise InputError(f"{error}; {cure}") from None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and check every file against the manifest."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        sums, ids = manifest["sha256"], manifest["clients"]
        number, record = manifest["round"], manifest["record"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path / _MANIFEST}: missing or not readable") from None
    contents = {}
    for name, expected in sums.items():
        try:
            contents[name] = (path / name).read_bytes()
        except OSError:
            raise InputError(f"{path / name}: missing") from None
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise InputError(f"{path / name}: damaged, its SHA-256 is not the manifest's")
    used = {client: load(contents[_file("clients", client)]) for client in ids}
    following = {
        client: load(contents[_file("next", client)])
        if _file("next", client) in contents
        else used[client]
        for client in ids
    }
    return Checkpoint(number, used, following, record)


def write_atomic(path: Path, text: str) -> None:
    """Replace a small text file in one step; a reader sees the old one or the new one."""
    draft = path.with_name(f"{DRAFT}{path.name}")
    _write_synced(draft, text.encode())
    os.replace(draft, path)
    _sync_folder(path.parent)


def _state_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    files = {}
    for client, state in checkpoint.used.items():
        files[_file("clients", client)] = save(dict(state))
        if checkpoint.next[client] is not state:
            files[_file("next", client)] = save(dict(checkpoint.next[client]))
    return files


def _file(group: str, client: str) -> str:
    return f"{group}/{client}.safetensors"


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

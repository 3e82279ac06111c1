"""Atomic checkpoints and exact resume, a client at a time.

``checkpoints/round-0007/`` holds ``clients/ID.safetensors``, what each client uses; where there are
any, ``next/`` (where the next round starts from something else), ``counted/`` (what counts of a
client, where its own state does not tell), ``optimizer/`` and ``server/``; and ``manifest.json``
with a SHA-256 of every file, which is written last. The folder is made under another name while its
round goes on, synced to disk and renamed, so under its own name it is whole, whenever the process
is killed. States are read when asked for: memory holds one client, not all. Nothing is pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from fedalt.errors import InputError

CLIENTS, NEXT, OPTIMIZER, SERVER = "clients", "next", "optimizer", "server"
COUNTED = "counted"
_NAME = re.compile(r"round-(\d{4,})")
_MANIFEST, LATEST = "manifest.json", "latest"
DRAFT = ".draft-"
_FOLDERS_OPEN = os.name != "nt"  # Windows opens none, and keeps their entries by itself
"""Begins the name of what a kill may leave half written; it counts as nothing."""


class StoredState(Mapping[str, Tensor]):
    """A state on disk; a tensor is read when it is asked for.

    ``safe_open`` only proves the file: it leaks 57 bytes with every tensor it reads (0.8.0).
    """

    def __init__(self, path: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Those tensors of the file whose names are wanted.

        Raises:
            InputError: the file is not there or is no safetensors file.
        """
        self._path = path
        try:
            with safe_open(path, framework="pt"), open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from None

        names = sorted(header.keys() - {"__metadata__"})
        self._entries = {name: header[name] for name in names if wanted(name)}
        self._start = 8 + length

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        with open(self._path, "rb") as file:
            file.seek(self._start + begin)
            data = file.read(end - begin)
        header = json.dumps({name: {**entry, "data_offsets": [0, len(data)]}}).encode()
        return load(len(header).to_bytes(8, "little") + header + data)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def only(self, wanted: Callable[[str], bool]) -> StoredState:
        """The tensors whose names are wanted, still on disk."""
        return StoredState(self._path, wanted)

    def read(self) -> dict[str, Tensor]:
        """All of it, in memory."""
        state = load(self._path.read_bytes())
        return {name: state[name] for name in self._entries}


class StateFolder:
    """States on disk, by group and name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, group: str, name: str) -> bool:
        return _file(self.path, group, name).exists()

    def state(self, group: str, name: str) -> StoredState:
        """One state of a group, read when asked for."""
        return StoredState(_file(self.path, group, name))


class Checkpoint(StateFolder):
    """The federation after a round, on disk.

    Attributes:
        path: its folder.
        round: the last finished round; 0 is before any training.
        record: what the run wrote beside the states, such as fingerprints.
    """

    def __init__(self, path: Path, number: int, record: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.round, self.record = number, record

    def used(self, client: str) -> StoredState:
        """What a client is evaluated and used with."""
        return self.state(CLIENTS, client)

    def next(self, client: str) -> StoredState:
        """What a client's next round starts from."""
        return self.state(NEXT if self.has(NEXT, client) else CLIENTS, client)


class Draft(StateFolder):
    """A checkpoint that is being written: states in, then ``commit``."""

    def __init__(self, run_dir: Path, number: int) -> None:
        root = run_dir / "checkpoints"
        self._run_dir, self._number = run_dir, number
        self._final = root / f"round-{number:04d}"
        super().__init__(root / f"{DRAFT}{self._final.name}")
        self._sums: dict[str, str] = {}
        shutil.rmtree(self.path, ignore_errors=True)
        with writing(self.path):
            self.path.mkdir(parents=True)

    def put(self, group: str, name: str, state: Mapping[str, Tensor]) -> StoredState:
        """Write one state; the same group and name again takes its place."""
        path = _file(self.path, group, name)
        content = save({key: tensor.contiguous() for key, tensor in state.items()})
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        self._sums[f"{group}/{path.name}"] = hashlib.sha256(content).hexdigest()
        return StoredState(path)

    def drop(self, group: str) -> None:
        """Forget a group that the checkpoint shall not hold."""
        folder = self.path / group
        if folder.exists():
            with writing(folder):
                shutil.rmtree(folder)
        self._sums = {name: s for name, s in self._sums.items() if not name.startswith(f"{group}/")}

    def commit(self, record: Mapping[str, Any], keep: int) -> Checkpoint:
        """Make the draft the run's newest checkpoint, then remove all but the ``keep`` newest."""
        manifest = {"round": self._number, "record": dict(record), "files": self._sums}
        with writing(self.path):
            for name in self._sums:
                _sync(self.path / name)
            (self.path / _MANIFEST).write_bytes(_sealed(manifest))
            _sync(self.path / _MANIFEST)
            for folder in {path.parent for path in self.path.rglob("*")}:
                _sync(folder)
            shutil.rmtree(self._final, ignore_errors=True)
            os.rename(self.path, self._final)
            _sync(self._final.parent)
        write_atomic(self._run_dir / LATEST, self._final.name + "\n")
        for old in list_checkpoints(self._run_dir)[:-keep]:
            with writing(old):
                shutil.rmtree(old)
        return Checkpoint(self._final, self._number, record)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    root = run_dir / "checkpoints"
    found = [path for path in root.glob("round-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round-")))


def load_latest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None where there is none yet.

    Raises:
        InputError: it is damaged; the message names the file and the checkpoint before it. Or all
            are gone.
    """
    found = list_checkpoints(run_dir)
    if not found:
        if (run_dir / LATEST).is_file():
            cure = "bring it back, or start again under another --out"
            raise InputError(f"{run_dir / LATEST}: names a checkpoint that is gone; {cure}")
        return None
    try:
        return load_checkpoint(found[-1])
    except InputError as error:
        raise InputError(f"{error}; {_way_back(found)}") from None


def _way_back(found: Sequence[Path]) -> str:
    """The cure where the newest checkpoint is damaged: what to remove for the last whole one."""
    for count in range(1, len(found)):
        with suppress(InputError):
            whole = load_checkpoint(found[-count - 1])
            damaged = " and ".join(str(path) for path in found[-count:])
            return f"remove {damaged} to go back to {whole.path.name}"
    return "none before it is whole, so start again under another --out"


def load_checkpoint(path: Path) -> Checkpoint:
    """Find one checkpoint whole: every file of the manifest is there, unaltered, and no other.

    Raises:
        InputError: names the file that is missing, damaged or foreign.
    """
    try:
        content = (path / _MANIFEST).read_bytes()
        manifest = json.loads(content)
        del manifest["sha256"]
        sums, number, record = manifest["files"], manifest["round"], manifest["record"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path / _MANIFEST}: missing or not readable") from None
    if content != _sealed(manifest):
        raise InputError(f"{path / _MANIFEST}: damaged, it does not fit its own SHA-256")
    if f"round-{number:04d}" != path.name:
        raise InputError(f"{path}: renamed, its manifest is of round {number}")
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    for name in sorted(present - sums.keys() - {_MANIFEST}):
        raise InputError(f"{path / name}: foreign, the manifest does not know it")
    for name, expected in sums.items():
        try:
            with open(path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            raise InputError(f"{path / name}: missing") from None
        if found != expected:
            raise InputError(f"{path / name}: damaged, its SHA-256 is not the manifest's")
    return Checkpoint(path, number, record)


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Replace a state's file in one step."""
    _replace(path, save({key: tensor.contiguous() for key, tensor in state.items()}))


def write_atomic(path: Path, text: str) -> None:
    """Replace a small text file in one step; a reader sees the old one or the new one."""
    _replace(path, text.encode())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses becomes an ``InputError``: the file, the reason and the cure."""
    try:
        yield
    except OSError as error:
        cures = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some space",
            errno.EFBIG: "allow larger files (ulimit -f)",
        }
        cure = cures.get(error.errno or 0, "make it writable")
        what = f"{error.filename2 or error.filename or path}: cannot write"
        reason = error.strerror or error
        raise InputError(f"{what}: {reason}; {cure} and go on with --resume") from None


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f"{DRAFT}{path.name}")
    with writing(path):
        draft.write_bytes(content)
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's file: itself with its own SHA-256."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode()


def _file(root: Path, group: str, name: str) -> Path:
    return root / group / f"{name}.safetensors"


def _sync(path: Path) -> None:
    """See a file or a folder to disk."""
    if path.is_dir() and not _FOLDERS_OPEN:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

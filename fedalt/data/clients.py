"""Clients and their records, from one folder a client or from the built-in sample."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedalt.config import SAMPLE, DataConfig
from fedalt.data.sample import sample_clients
from fedalt.errors import InputError


@dataclass(frozen=True)
class Record:
    """One example: what is asked, what it is asked about, and the answer."""

    instruction: str
    output: str
    input: str = ""
    category: str = ""


@dataclass(frozen=True)
class Client:
    """A participant, known by a stable id, with its own train and test records."""

    id: str
    train: tuple[Record, ...]
    test: tuple[Record, ...]

    def fingerprint(self) -> str:
        """SHA-256 over all records, by which a resume knows that the data is still the same."""
        rows = [[asdict(record) for record in part] for part in (self.train, self.test)]
        return hashlib.sha256(json.dumps([self.id, rows]).encode()).hexdigest()


def load_clients(config: DataConfig, seed: int) -> list[Client]:
    """Every client that ``config`` names, in the order of the ids or as ``config.clients`` says.

    Args:
        config: the folder, or ``sample``.
        seed: makes the built-in sample; a folder does not depend on it.

    Raises:
        InputError: a folder or file is missing or empty, a record is not as it should be, a
            client is there twice. The message names file, line and field.
    """
    if config.path == SAMPLE:
        clients = {
            client_id: Client(
                client_id,
                *(
                    tuple(_record(row, f"sample/{client_id}") for row in parts[name])
                    for name in ("train", "test")
                ),
            )
            for client_id, parts in sample_clients(seed).items()
        }
        return [clients[name] for name in _chosen(list(clients), config)]
    root = Path(config.path)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; data wants a folder with one folder a client")
    folders = {path.name: path for path in sorted(root.iterdir()) if _is_client(path)}
    if not folders:
        raise InputError(f"{root}: no folder with a train.jsonl; data wants one folder a client")
    _refuse_twins(folders)
    return [
        Client(name, _read_records(folders[name], "train"), _read_records(folders[name], "test"))
        for name in _chosen(list(folders), config)
    ]


def read_jsonl(path: Path) -> tuple[Record, ...]:
    """The records of one file, a JSON object a line; blank lines are passed over.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or a line is no record.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}:1: this is UTF-16; save the file as UTF-8")
    records = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
            raise InputError(f"{where}: not UTF-8 ({byte}); save the file as UTF-8") from None
        if not text:
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise InputError(f"{where}: broken JSON: {reason}; want one object a line") from None
        records.append(_record(row, where))
    if not records:
        raise InputError(f"{path}: empty; a client needs at least one record here")
    return tuple(records)


def _read_records(folder: Path, part: str) -> tuple[Record, ...]:
    path = folder / f"{part}.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: missing; every client folder wants train.jsonl and test.jsonl")
    return read_jsonl(path)


def _record(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise InputError(f"{where}: wants a JSON object, got {type(row).__name__}")
    fields = {}
    for name, needed in (("instruction", True), ("output", True), ("input", False)):
        value = row.get(name)
        if value is None and not needed:
            value = ""
        if value is None:
            raise InputError(f"{where}: field '{name}' is missing")
        if not isinstance(value, str):
            raise InputError(f"{where}: field '{name}' must be text, got {type(value).__name__}")
        if needed and not value.strip():
            raise InputError(f"{where}: field '{name}' is empty")
        fields[name] = value.strip()
    return Record(**fields, category=str(row.get("category") or ""))


def _is_client(path: Path) -> bool:
    hidden = path.name.startswith((".", "_"))
    return path.is_dir() and not hidden


def _refuse_twins(folders: dict[str, Path]) -> None:
    """Two names that some file systems hold to be one, or two links to one folder."""
    seen: dict[str, Path] = {}
    for name, path in folders.items():
        for key in (unicodedata.normalize("NFC", name).casefold(), str(path.resolve())):
            if key in seen and seen[key] != path:
                raise InputError(f"{path}: the same client as {seen[key]}; keep one of the two")
            seen[key] = path


def _chosen(known: list[str], config: DataConfig) -> list[str]:
    for position, name in enumerate(config.clients):
        if name not in known:
            raise InputError(f"data.clients: no client {name!r}; known: {', '.join(known)}")
        if name in config.clients[:position]:
            raise InputError(f"data.clients: names the client {name!r} twice; name it once")
    return list(config.clients) or known

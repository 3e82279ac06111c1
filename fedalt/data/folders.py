"""Clients from folders: one folder a client, of text or of images, or one folder a domain."""

from __future__ import annotations

import gzip
import json
import unicodedata
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedalt.config import DataConfig, PartitionConfig
from fedalt.data.chats import Chat, chat_record
from fedalt.data.images import ImageRecord, domain_clients, read_image_folder, subfolders
from fedalt.data.records import Client, Parts, Record
from fedalt.errors import InputError, require_encodable

PARTS = ("train", "test")
DOMAIN = "domain"
"""What ``partition.column`` says to make a client of each domain's folder."""


def holds_text_clients(root: Path) -> bool:
    """Whether a folder in ``root`` holds a ``train.jsonl`` or ``test.jsonl``, or one in gzip."""
    return any(_text_files(folder, part) for folder in subfolders(root) for part in PARTS)


def holds_image_clients(root: Path) -> bool:
    """Whether a folder in ``root`` holds a folder ``train`` or ``test`` with folders in it.

    A class may be called ``train``, as one of DomainNet is; its folder holds files.
    """
    parts = [folder / part for folder in subfolders(root) for part in PARTS]
    return any(part.is_dir() and subfolders(part) for part in parts)


def text_clients(root: Path) -> list[Client]:
    """A client for each folder in ``root``, by name; every read goes back to its two files.

    Raises:
        InputError: no folder, one client twice, or, on reading, a file that ``read_jsonl`` refuses.
    """
    return _folder_clients(root, "no folder with a train.jsonl", _read_text)


def image_clients(root: Path) -> list[Client]:
    """A client for each folder in ``root``, by name: ``train/CLASS/*`` and ``test/CLASS/*``.

    Raises:
        InputError: no folder, one client twice, or, on reading, a part that is missing or empty.
    """
    return _folder_clients(root, "no folder with train/CLASS and test/CLASS", _read_images)


def domain_folder_clients(
    root: Path, data: DataConfig, partition: PartitionConfig, seed: int
) -> list[Client]:
    """Clients out of ``root/DOMAIN/CLASS/*``, one a domain or ``partition.clients`` in all.

    Only names of files are kept. Without ``partition.by``, or with fewer clients than domains, each
    domain is one client; otherwise every domain is dealt to equally many.

    Raises:
        InputError: no image, or domains that cannot be dealt to so many clients.
    """
    _refuse_twins({path.name: path for path in subfolders(root)})
    domains, share = len(subfolders(root)), 1
    if partition.by and partition.clients > domains > 0:
        share, left = divmod(partition.clients, domains)
        if left:
            raise InputError(
                f"partition.clients: {domains} domains in {root} cannot be dealt equally to "
                f"{partition.clients} clients; give a multiple of {domains}"
            )
    clients = []
    for name, train, test in domain_clients(root, share, data.test_share, seed):
        domain, size = train[0].category, len(train) + len(test)
        if partition.by and size < partition.min_records:
            raise InputError(
                f"{root / domain}: {size} images a client, fewer than partition.min_records "
                f"({partition.min_records}); lower that or partition.clients"
            )
        files = [tuple(str(record.image) for record in part) for part in (train, test)]
        client_id = domain if share == 1 else name
        clients.append(Client(client_id, partial(_read_files, domain, *files)))
    return clients


def read_jsonl(path: Path) -> tuple[Record | Chat, ...]:
    """The records of one file, a JSON object a line; blank lines are passed over.

    Of a file whose name ends in ``.gz``, the text is unpacked in memory.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or a line is no record.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from None
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            raise InputError(f"{path}: no whole gzip file; write it anew") from None
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
        records.append(text_record(row, where))
    if not records:
        raise InputError(f"{path}: empty; a client needs at least one record here")
    return tuple(records)


def text_record(row: Any, where: str, columns: Mapping[str, str] | None = None) -> Record | Chat:
    """The record that a row holds; texts lose their outer white space.

    Args:
        row: ``instruction``, ``output`` and, if there, ``input``, ``category`` and ``options``,
            which are two or more texts with the output among them. Or, without an ``instruction``,
            ``messages``, as in ``chat_record``. Other fields are passed over.
        where: what a message calls the row, such as ``FILE:LINE``.
        columns: by field, the column that it came from where that has another name.

    Raises:
        InputError: the row is no mapping, or a field is missing, empty, of another kind, or text
            that cannot be encoded.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: wants a JSON object, got {type(row).__name__}")
    names = {
        field: f"column '{column}'" for field, column in (columns or {}).items() if column != field
    }
    if row.get("instruction") is None and row.get("messages") is not None:
        return chat_record(row, where, names.get("messages", "field 'messages'"))
    fields: dict[str, Any] = {}
    for name, needed in (("instruction", True), ("output", True), ("input", False)):
        value = row.get(name)
        called = names.get(name, f"field '{name}'")
        if value is None and not needed:
            value = ""
        if value is None:
            raise InputError(f"{where}: {called} is missing")
        if not isinstance(value, str):
            raise InputError(f"{where}: {called} must be text, got {type(value).__name__}")
        if needed and not value.strip():
            raise InputError(f"{where}: {called} is empty")
        require_encodable(value, f"{where}: {called}")
        fields[name] = value.strip()
    category = row.get("category")
    fields["category"] = "" if category is None else str(category)
    called = names.get("category", "field 'category'")
    require_encodable(fields["category"], f"{where}: {called}")
    called = names.get("options", "field 'options'")
    return Record(**fields, options=_options(row.get("options"), fields["output"], where, called))


def _options(value: Any, output: str, where: str, called: str) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if not texts or len(value) < 2:
        raise InputError(f"{where}: {called} must be a list of two texts or more, got {value!r}")
    for item in value:
        require_encodable(item, f"{where}: {called}")
    options = tuple(item.strip() for item in value)
    if output not in options:
        raise InputError(f"{where}: the output {output!r} is not among {called}; add it there")
    return options


def _folder_clients(root: Path, none_found: str, read: Callable[[Path], Parts]) -> list[Client]:
    folders = {path.name: path for path in subfolders(root)}
    if not folders:
        raise InputError(f"{root}: {none_found}; data wants one folder a client")
    _refuse_twins(folders)
    return [Client(name, partial(read, folder)) for name, folder in folders.items()]


def _read_text(folder: Path) -> Parts:
    files = []
    for part in PARTS:
        path, found = folder / f"{part}.jsonl", _text_files(folder, part)
        if not found:
            raise InputError(
                f"{path}: missing; every client folder wants train.jsonl and test.jsonl"
            )
        if len(found) > 1:
            raise InputError(f"{path}: there is a {found[1].name} too; keep one of the two")
        files += found
    return Parts(*map(read_jsonl, files))


def _text_files(folder: Path, part: str) -> list[Path]:
    """The files of a client's part: one, in order."""
    names = (f"{part}.jsonl", f"{part}.jsonl.gz")
    return [folder / name for name in names if (folder / name).is_file()]


def _read_images(folder: Path) -> Parts:
    return Parts(*read_image_folder(folder))


def _read_files(domain: str, train: tuple[str, ...], test: tuple[str, ...]) -> Parts:
    """Image records of ``.../CLASS/NAME`` files."""
    parts = [
        [ImageRecord(Path(name), Path(name).parent.name, domain) for name in part]
        for part in (train, test)
    ]
    return Parts(*parts)


def _refuse_twins(folders: Mapping[str, Path]) -> None:
    """Two names that some file systems hold to be one, or two links to one folder."""
    seen: dict[str, Path] = {}
    for name, path in folders.items():
        for key in (unicodedata.normalize("NFC", name).casefold(), str(path.resolve())):
            if key in seen and seen[key] != path:
                raise InputError(f"{path}: the same client as {seen[key]}; keep one of the two")
            seen[key] = path

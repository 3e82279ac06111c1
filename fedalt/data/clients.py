"""Every client of a federation, wherever its records are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fedalt.config import DIGITS, SAMPLE, DataConfig, PartitionConfig
from fedalt.data import folders, table
from fedalt.data.chats import Chat
from fedalt.data.digits import digits_clients
from fedalt.data.records import Client, Parts, Record
from fedalt.data.sample import sample_clients
from fedalt.data.sources import holds_table, is_source
from fedalt.errors import InputError


def load_clients(data: DataConfig, partition: PartitionConfig, seed: int) -> list[Client]:
    """Every client that ``data`` names, in the order of the ids or as ``data.clients`` says.

    Files are read when a client's ``read`` is called, and anew each time; what is known here is
    who the clients are and, of a dataset that is cut, which rows are whose.

    Args:
        data: the records: ``sample``, ``digits``, one folder a client, one folder a domain, or a
            `datasets` dataset.
        partition: how a dataset is cut into clients. Data that has its clients already wants none.
        seed: of the built-in federations and of every cut; one folder a client does not depend
            on it.

    Raises:
        InputError: data is missing, cannot be cut as asked, or a client is there twice. What is
            wrong inside a folder's files is told on ``read``.
    """
    clients = {client.id: client for client in _all_clients(data, partition, seed)}
    return [clients[name] for name in _chosen(list(clients), data)]


def _all_clients(data: DataConfig, partition: PartitionConfig, seed: int) -> Sequence[Client]:
    path = Path(data.path)
    if data.sources:
        _refuse_cut(data, partition)
        return table.source_clients(data, seed)
    if data.path in (SAMPLE, DIGITS):
        _refuse_cut(data, partition)
        return _built_in(data, seed)
    if data.kind == "image" and path.is_dir():
        if folders.holds_image_clients(path):
            _refuse_cut(data, partition)
            return folders.image_clients(path)
        cut = (partition.by, partition.column)
        domains = not partition.by or cut == ("column", folders.DOMAIN)
        if domains and not holds_table(path):
            _refuse_columns(data)
            return folders.domain_folder_clients(path, data, partition, seed)
    elif path.is_dir() and (folders.holds_text_clients(path) or not holds_table(path)):
        _refuse_cut(data, partition)
        return folders.text_clients(path)
    if not is_source(data.path):
        raise InputError(
            f"{data.path}: no such folder or file, and no hub id (owner/name); data wants a folder "
            "with one folder a client, or a dataset to cut"
        )
    return table.table_clients(data, partition, seed)


def _built_in(data: DataConfig, seed: int) -> list[Client]:
    kind = "text" if data.path == SAMPLE else "image"
    if data.kind != kind:
        raise InputError(f"data.kind: {data.path} is {kind}, got {data.kind!r}; set {kind!r}")
    if data.path == DIGITS:
        return [
            Client(name, partial(Parts, train, test))
            for name, (train, test) in digits_clients(seed).items()
        ]
    return [
        Client(
            name,
            partial(Parts, *(_records(parts[part], f"sample/{name}") for part in folders.PARTS)),
        )
        for name, parts in sample_clients(seed).items()
    ]


def _records(rows: Sequence[dict[str, str]], where: str) -> tuple[Record | Chat, ...]:
    return tuple(folders.text_record(row, where) for row in rows)


def _refuse_cut(data: DataConfig, partition: PartitionConfig) -> None:
    """Of data that has its clients already; only a source's rows have columns to rename."""
    if partition.by:
        raise InputError(
            f"partition.by: {data.name} has its clients already and is not cut; "
            "leave partition out, or -c partition={}"
        )
    if not data.sources:
        _refuse_columns(data)


def _refuse_columns(data: DataConfig) -> None:
    if data.columns:
        raise InputError(
            f"data.columns: {data.name} has no columns but fields of fixed names; leave it out"
        )


def _chosen(known: list[str], data: DataConfig) -> list[str]:
    for position, name in enumerate(data.clients):
        if name not in known:
            raise InputError(f"data.clients: no client {name!r}; known: {', '.join(known)}")
        if name in data.clients[:position]:
            raise InputError(f"data.clients: names the client {name!r} twice; name it once")
    return list(data.clients) or known

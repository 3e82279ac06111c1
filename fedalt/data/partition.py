"""One dataset cut into clients, in arithmetic of row indices alone.

A cut draws how many records of every label go to every client, the counts [labels, clients], and
then deals each label's records out at random in those numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedalt.config import PartitionConfig
from fedalt.errors import InputError

Indices = NDArray[np.int64]
TRIES = 1000
"""Draws until every client has enough records; a draw of counts costs less than a millisecond."""
LONGEST_ID = 60  # bytes; a file's name has 255 on most disks, and ids get endings and prefixes


def cut(
    partition: PartitionConfig, records: int, labels: Sequence[str], seed: int
) -> dict[str, Indices]:
    """By client, the rows that it holds: every row once, in ascending order.

    Args:
        partition: how to cut, and into how many.
        records: rows in all.
        labels: by row, the value of ``partition.column``; ``equal`` does not look at them.
        seed: of every draw; equal arguments give equal cuts.

    Returns:
        Clients ``client-00``, ``client-01``, ...; with ``column``, one for each value, named after
        it and in the order of the names.

    Raises:
        InputError: the labels or records do not suffice for what is asked, or no draw does.
    """
    if partition.by == "column":
        return _by_value(labels, partition)
    if records < partition.clients * partition.min_records:
        raise InputError(
            f"partition.clients: {records} records do not give {partition.clients} clients "
            f"{partition.min_records} each; lower partition.clients or partition.min_records"
        )
    rng = np.random.default_rng(seed)
    if partition.by == "equal":
        parts = np.array_split(rng.permutation(records), partition.clients)
    else:
        codes = _superclassed(labels, partition)
        sizes = np.bincount(codes)
        draw = _dirichlet if partition.by == "dirichlet" else _pathological
        parts = _deal(rng, codes, _draw_enough(draw, rng, sizes, partition))
    width = max(2, len(str(partition.clients - 1)))
    return {f"client-{number:0{width}d}": np.sort(part) for number, part in enumerate(parts)}


def client_id(value: str) -> str:
    """``value`` made fit to be a file's name: letters, digits, ``.``, ``_``, ``-``, cut short."""
    words = re.sub(r"[^\w.]+", "-", unicodedata.normalize("NFC", value))
    return words.strip("-._").encode()[:LONGEST_ID].decode(errors="ignore")


def split_test(
    rows: Indices, codes: NDArray[np.int64], test_share: float, rng: np.random.Generator
) -> tuple[Indices, Indices]:
    """A client's rows in two: train and test, each shuffled.

    The test part holds ``test_share`` of the rows, at least one, and nearly that share of every
    class, which keeps a row or more to train on: a class of one row is not tested. Where no class
    has two rows, classes are not looked at.

    Args:
        rows: [n], two or more.
        codes: [n], the class of each row, counted from 0.
        test_share: in (0, 1).
        rng: of the draw.
    """
    sizes = np.bincount(codes)
    if sizes.max() < 2:
        codes, sizes = np.zeros_like(codes), np.array([len(rows)])
    most = np.maximum(sizes - 1, 0)
    wanted = np.clip(round(len(rows) * test_share), 1, most.sum())
    exact = np.minimum(sizes * test_share, most)
    tested = np.floor(exact).astype(np.int64)
    by_remainder = np.lexsort((rng.permutation(len(sizes)), tested - exact))
    while (short := wanted - tested.sum()) > 0:
        open_classes = by_remainder[tested[by_remainder] < most[by_remainder]]
        tested[open_classes[:short]] += 1
    order = rng.permutation(len(rows))
    grouped = order[np.argsort(codes[order], kind="stable")]
    place = np.arange(len(rows)) - (np.cumsum(sizes) - sizes)[codes[grouped]]
    is_test = np.zeros(len(rows), dtype=bool)
    is_test[grouped] = place < tested[codes[grouped]]
    return rows[order[~is_test[order]]], rows[order[is_test[order]]]


def _by_value(labels: Sequence[str], partition: PartitionConfig) -> dict[str, Indices]:
    values, codes = np.unique(np.asarray(labels), return_inverse=True)
    clients: dict[str, Indices] = {}
    seen: dict[str, str] = {}
    for code, value in enumerate(map(str, values)):
        name = client_id(value)
        where = f"partition.column {partition.column!r}"
        if not name:
            raise InputError(f"{where}: {value!r} makes no client's name; give it a letter")
        if name.casefold() in seen:
            other = seen[name.casefold()]
            raise InputError(f"{where}: {other!r} and {value!r} make one name; rename one of them")
        seen[name.casefold()] = value
        clients[name] = np.flatnonzero(codes == code)
        if len(clients[name]) < partition.min_records:
            raise InputError(
                f"{where}: {value!r} has fewer records ({len(clients[name])}) than "
                f"partition.min_records ({partition.min_records}); lower that, or remove its rows"
            )
    return dict(sorted(clients.items()))


def _superclassed(labels: Sequence[str], partition: PartitionConfig) -> NDArray[np.int64]:
    """By row, the number of its label, or of its label's superclass where those are given."""
    names, codes = np.unique(np.asarray(labels), return_inverse=True)
    if not partition.superclasses:
        return codes
    for name in map(str, names):
        if name not in partition.superclasses:
            raise InputError(
                f"partition.superclasses: no entry for the label {name!r}; add it there"
            )
    above = [partition.superclasses[str(name)] for name in names]
    return np.unique(np.asarray(above), return_inverse=True)[1][codes]


def _draw_enough(
    draw: Callable[[np.random.Generator, Indices, PartitionConfig], Indices],
    rng: np.random.Generator,
    sizes: Indices,
    partition: PartitionConfig,
) -> Indices:
    for _ in range(TRIES):
        counts = draw(rng, sizes, partition)
        if counts.sum(axis=0).min() >= partition.min_records:
            return counts
    cure = "raise partition.alpha" if partition.by == "dirichlet" else "raise partition.classes"
    raise InputError(
        f"partition: none of {TRIES} draws gave each of {partition.clients} clients "
        f"{partition.min_records} records; {cure}, or lower partition.clients "
        "or partition.min_records"
    )


def _dirichlet(rng: np.random.Generator, sizes: Indices, partition: PartitionConfig) -> Indices:
    """Each label's records in shares drawn from a symmetric Dirichlet over the clients."""
    shares = rng.dirichlet(np.full(partition.clients, partition.alpha), size=len(sizes))
    ends = np.rint(np.cumsum(shares, axis=1) * sizes[:, None]).astype(np.int64)
    ends[:, -1] = sizes
    return np.diff(ends, axis=1, prepend=0)


def _pathological(rng: np.random.Generator, sizes: Indices, partition: PartitionConfig) -> Indices:
    """Each client takes the labels that fewest have taken so far; a label is cut equally.

    So every client has ``classes`` different labels, and no label has two takers more than another.
    """
    clients, classes = partition.clients, partition.classes
    if classes > len(sizes):
        raise InputError(
            f"partition.classes: {classes} labels a client, but column {partition.column!r} has "
            f"{len(sizes)}; lower partition.classes"
        )
    if clients * classes < len(sizes):
        raise InputError(
            f"partition.classes: {clients} clients of {classes} labels leave some of "
            f"{len(sizes)} labels over; raise partition.clients or partition.classes"
        )
    most = -(-clients * classes // len(sizes))
    if sizes.min() < most:
        raise InputError(
            f"partition.clients: a label with {sizes.min()} records cannot be cut for {most} "
            "clients; lower partition.clients or partition.classes"
        )
    takes = np.zeros((len(sizes), clients), dtype=np.int64)
    for client in range(clients):
        fewest = np.lexsort((rng.permutation(len(sizes)), takes.sum(axis=1)))
        takes[fewest[:classes], client] = 1
    takers = takes.sum(axis=1)
    counts = takes * (sizes // takers)[:, None]
    for label, left in enumerate(sizes % takers):
        counts[label, rng.permutation(np.flatnonzero(takes[label]))[:left]] += 1
    return counts


def _deal(rng: np.random.Generator, codes: NDArray[np.int64], counts: Indices) -> list[Indices]:
    parts: list[list[Indices]] = [[] for _ in range(counts.shape[1])]
    for label, row in enumerate(counts):
        records = rng.permutation(np.flatnonzero(codes == label))
        for part, share in zip(parts, np.split(records, np.cumsum(row)[:-1]), strict=True):
            part.append(share)
    return [np.concatenate(part) for part in parts]

"""Rows of a `datasets` dataset as the records of clients, each read when its turn comes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from fedalt.config import DataConfig, PartitionConfig
from fedalt.data.chats import Chat
from fedalt.data.folders import text_record
from fedalt.data.images import ImageRecord
from fedalt.data.partition import Indices, client_id, cut, split_test
from fedalt.data.records import Client, Parts, Record
from fedalt.data.sources import import_datasets, open_dataset
from fedalt.data.suites import suite_columns, suite_of, suite_record
from fedalt.errors import InputError, require_encodable

RECORDS, IMAGES = "records", "images"
FIELDS = {
    RECORDS: ("instruction", "output", "input", "category", "options", "messages"),
    IMAGES: ("image", "label", "category"),
}
NEEDED = {RECORDS: ("instruction", "output"), IMAGES: ("image", "label")}
COMMON = {"image": ("img",), "label": ("fine_label",)}
"""Other names that a field's column goes by."""
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for an image that is none."""


@dataclass(frozen=True)
class Table:
    """A dataset, and how its rows read.

    Attributes:
        source: what messages call it.
        rows: a `datasets.Dataset`; its rows stay on disk.
        columns: by field of a row, the column that holds it.
        format: ``records``, ``images`` or the name of a suite.
    """

    source: str
    rows: Any
    columns: Mapping[str, str]
    format: str

    def read(self, indices: Indices) -> list[Record | Chat | ImageRecord]:
        """The records of these rows, in this order.

        Raises:
            InputError: a row is no record; the message counts rows from 1.
        """
        batch = self._batch(list(dict.fromkeys(self.columns.values())), indices.tolist())
        named = {
            field: _named(batch[column], self.rows.features[column])
            for field, column in self.columns.items()
        }
        return [
            self._record({field: values[place] for field, values in named.items()}, int(index))
            for place, index in enumerate(indices)
        ]

    def values(self, column: str) -> list[Any]:
        """A column in every row; classes by their names, hidden ones as None."""
        return _named(self._batch([column])[column], self.rows.features[column])

    def names(self, column: str) -> list[str]:
        """A column's value in every row, as text.

        Raises:
            InputError: no such column, a row without a value, or values that are no names.
        """
        _require_column(column, self.rows.column_names, self.source, "partition.column")
        values = self.values(column)
        for row, value in enumerate(values, start=1):
            if value is None or value == "":
                raise InputError(
                    f"{self.source}: row {row}: column '{column}' is empty or its class is hidden; "
                    "remove the row, or choose other data.splits"
                )
            if not isinstance(value, str | int | float | bool):
                kind = type(value).__name__
                raise InputError(f"{self.source}: column '{column}' holds {kind}, not names")
        return [str(value) for value in values]

    def _record(self, row: dict[str, Any], index: int) -> Record | Chat | ImageRecord:
        where = f"{self.source}: row {index + 1}"
        if self.format == RECORDS:
            return text_record(row, where, self.columns)
        if self.format != IMAGES:
            return suite_record(self.format, row, where)
        if row["image"] is None:
            column = self.columns["image"]
            raise InputError(f"{where}: column '{column}' is empty; remove the row")
        category = row.get("category")
        return ImageRecord(
            row["image"], str(row["label"]), "" if category is None else str(category)
        )

    def _batch(self, columns: list[str], places: list[int] | None = None) -> dict[str, list[Any]]:
        """These columns of these rows, or of all; ``InputError`` names the first unreadable one."""
        kept = self.rows.select_columns(columns)
        try:
            return kept[:] if places is None else kept[places]
        except UNREADABLE as error:
            for place, column in itertools.product(places or range(len(kept)), columns):
                where = f"{self.source}: row {place + 1}"
                try:
                    kept.select_columns([column])[place]
                except UnicodeDecodeError:
                    raise InputError(
                        f"{where}: column '{column}' is not UTF-8; mend or remove the row"
                    ) from None
                except UNREADABLE:
                    raise InputError(f"{where}: broken image; replace or remove the row") from None
            raise InputError(f"{self.source}: cannot read: {error}") from None


def table_clients(data: DataConfig, partition: PartitionConfig, seed: int) -> list[Client]:
    """Clients that ``partition`` cuts out of the one dataset ``data.path``.

    Raises:
        InputError: the dataset cannot be read, lacks a column, or cannot be cut as asked.
    """
    if not partition.by:
        raise InputError(
            f"{data.path}: this is one dataset; say in partition.by how to cut it into clients "
            "(column, dirichlet, pathological, equal)"
        )
    category = partition.column if partition.by == "column" else ""
    table = open_table(data.path, data, category)
    labels = table.names(partition.column) if partition.column else []
    clients = cut(partition, len(table.rows), labels, seed)
    return _split_clients({name: (table, rows) for name, rows in clients.items()}, data, seed)


def source_clients(data: DataConfig, seed: int) -> list[Client]:
    """A client for each dataset of ``data.sources``, in the order of their names.

    Raises:
        InputError: a dataset cannot be read or lacks a column, or a name is unfit for a file.
    """
    tables = {}
    for name, source in sorted(data.sources.items()):
        if client_id(name) != name:
            raise InputError(
                f"data.sources: {name!r} cannot name a client's files; try {client_id(name)!r}"
            )
        table = open_table(source, data)
        tables[name] = (table, np.arange(len(table.rows)))
    folded = {name.casefold() for name in tables}
    if len(folded) < len(tables):
        raise InputError("data.sources: two names differ in case alone; rename one")
    return _split_clients(tables, data, seed)


def open_table(source: str, data: DataConfig, category: str = "") -> Table:
    """The dataset ``source``, with the columns of its records found.

    Args:
        source: as in ``open_dataset``.
        data: kind, splits, columns and format.
        category: the column of the category, where no other says so; empty: none.

    Raises:
        InputError: the dataset cannot be read, is empty, or lacks a column that it needs.
    """
    rows = open_dataset(source, data.splits)
    if len(rows) == 0:
        raise InputError(f"{source}: empty; a dataset needs records")
    known = rows.column_names
    form = _format(data, known)
    for column, feature in rows.features.items():
        for name in getattr(feature, "names", None) or ():
            require_encodable(name, f"{source}: column '{column}': the class {name!r}")
    for field, column in data.columns.items():
        _require_column(column, known, source, f"data.columns.{field}")
    columns = _columns(data, form, known, source)
    if category and form in FIELDS:
        columns.setdefault("category", category)
    if form == IMAGES:
        datasets = import_datasets(source)
        column = columns["image"]
        if not isinstance(rows.features[column], datasets.Image):
            try:
                rows = rows.cast_column(column, datasets.Image())
            except (TypeError, ValueError, NotImplementedError):
                raise InputError(
                    f"{source}: column '{column}' holds no images; name another in data.columns"
                ) from None
    return Table(source, rows, columns, form)


def _format(data: DataConfig, known: Collection[str]) -> str:
    if data.kind == "image":
        return IMAGES
    if data.format != "auto":
        return data.format
    fields = {*known, *data.columns}
    records = fields >= set(NEEDED[RECORDS]) or "messages" in fields
    return RECORDS if records else suite_of(fields) or RECORDS


def _columns(data: DataConfig, form: str, known: Collection[str], source: str) -> dict[str, str]:
    """By field, its column: as ``data.columns`` says, of the same name, or of a common one."""
    needed = NEEDED[form] if form in NEEDED else suite_columns(form)
    if form == RECORDS and "messages" in {*known, *data.columns}:
        needed = ()  # each row says what it is
    fields = FIELDS.get(form, needed)
    for field in data.columns:
        if field not in fields:
            raise InputError(
                f"data.columns: {form} have no field {field!r}; known: {', '.join(fields)}"
            )
    columns = {}
    for field in fields:
        common = [name for name in COMMON.get(field, ()) if name in known]
        if field in data.columns:
            columns[field] = data.columns[field]
        elif field in known:
            columns[field] = field
        elif len(common) == 1:
            columns[field] = common[0]
        elif field in needed:
            raise InputError(
                f"{source}: no column for '{field}'; name it in data.columns, "
                f"such as -c 'data.columns={{{field}: NAME}}'; known: {', '.join(known)}"
            )
    return columns


def _require_column(column: str, known: Collection[str], source: str, key: str) -> None:
    if column not in known:
        raise InputError(f"{source}: {key}: no column {column!r}; known: {', '.join(known)}")


def _split_clients(
    clients: Mapping[str, tuple[Table, Indices]], data: DataConfig, seed: int
) -> list[Client]:
    """Each client's rows cut into train and test by a seed of its own.

    Images keep their labels' shares in both parts, texts those of their categories.
    """
    codes: dict[int, np.ndarray] = {}
    found = []
    for name, (table, rows) in clients.items():
        if len(rows) < 2:
            raise InputError(
                f"client {name!r} has 1 record of {table.source}, which cannot be cut into train "
                "and test; give it more, or leave it out"
            )
        if id(table) not in codes:
            codes[id(table)] = _strata(table)
        rng = np.random.default_rng([seed, *name.encode()])
        train, test = split_test(rows, codes[id(table)][rows], data.test_share, rng)
        found.append(Client(name, partial(_read, table, train, test)))
    return found


def _strata(table: Table) -> np.ndarray:
    if table.format == IMAGES:
        values = table.names(table.columns["label"])
    elif table.format == RECORDS and "category" in table.columns:
        values = [str(value) for value in table.values(table.columns["category"])]
    else:
        return np.zeros(len(table.rows), dtype=np.int64)
    return np.unique(np.asarray(values), return_inverse=True)[1]


def _read(table: Table, train: Indices, test: Indices) -> Parts:
    return Parts(table.read(train), table.read(test))


def _named(values: list[Any], feature: Any) -> list[Any]:
    """Class numbers as the names of their classes; a hidden one (-1) as None."""
    names = getattr(feature, "names", None)
    if names is None:
        return values
    return [None if value is None or value < 0 else names[value] for value in values]

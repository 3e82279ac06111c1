"""Opening a `datasets` dataset: local files, a saved one, or one of the Hugging Face hub.

The library is optional and imported here alone. Rows stay on disk: files are turned into its
memory-mapped cache once and again when they change.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fedalt.errors import InputError, not_installed

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""By suffix of a file, packed by gzip or not, the name by which `datasets` reads it."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SAVED = ("dataset_dict.json", "state.json")
"""What ``save_to_disk`` leaves in its folder."""
LONGEST_REASON = 300


def import_datasets(wanted_by: str) -> Any:
    """The `datasets` library.

    Args:
        wanted_by: what an error's line begins with.

    Raises:
        InputError: it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise not_installed(wanted_by, "datasets", "data") from None
    return datasets


def holds_table(folder: Path) -> bool:
    """Whether a folder is a saved dataset or has data files in it or one folder below."""
    if any((folder / name).is_file() for name in SAVED):
        return True
    return any(
        _suffix(path.name) in BUILDERS for depth in ("*", "*/*") for path in folder.glob(depth)
    )


def is_source(path: str) -> bool:
    """Whether ``path`` names data that `datasets` may open, there or on the hub."""
    return bool(_files(path) or Path(_base(path)).is_dir() or HUB_ID.fullmatch(_base(path)))


def is_on_hub(path: str) -> bool:
    """Whether ``path`` can only be a hub id: nothing of that name is here."""
    here = _files(path) or Path(_base(path)).exists()
    return not here and bool(HUB_ID.fullmatch(_base(path)))


def open_dataset(source: str, splits: Sequence[str]) -> Any:
    """One memory-mapped `datasets.Dataset` of the splits, joined in the order given.

    Args:
        source: a file or pattern (``*.jsonl``, json, csv, parquet, arrow), a folder of such or of
            images, a folder made by ``save_to_disk``, or a hub id; a folder or id may end in
            ``:CONFIG``. A plain file is the split ``train``.
        splits: the names of those wanted.

    Raises:
        InputError: `datasets` is missing, the source cannot be read or reached, or a split is not
            there.
    """
    if not is_source(source):
        raise InputError(f"{source}: no such folder or file, and no hub id (owner/name)")
    files = _files(source)
    base = _base(source)
    here = bool(files) or Path(base).is_dir()
    datasets = import_datasets(source if here else f"{source}: no such folder or file; a hub id")
    try:
        with _quiet(datasets) if here else nullcontext():
            if files:
                loaded = datasets.load_dataset(_builder(source, files), data_files=files)
            elif any((Path(source) / name).is_file() for name in SAVED):
                loaded = datasets.load_from_disk(source)
            else:
                loaded = datasets.load_dataset(base, source[len(base) + 1 :] or None)
        if not isinstance(loaded, dict):
            loaded = {"train": loaded}
        for split in splits:
            if split not in loaded:
                raise InputError(f"{source}: no split {split!r}; known: {', '.join(loaded)}")
        return datasets.concatenate_datasets([loaded[split] for split in splits])
    except InputError:
        raise
    except ConnectionError:
        raise InputError(
            f"{source}: no such folder or file here, and the Hugging Face hub cannot be reached; "
            "mend the path, or download the dataset first"
        ) from None
    except Exception as error:  # whatever a file's reader or the hub's client may raise
        raise InputError(f"{source}: datasets cannot read it: {_reason(error)}") from None


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No bars and messages of `datasets`, which would stand in front of an error's one line."""
    log = datasets.utils.logging
    level, shown = log.get_verbosity(), not datasets.are_progress_bars_disabled()
    log.set_verbosity(log.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _base(source: str) -> str:
    """The source without a trailing ``:CONFIG``; a path that is there is whole."""
    return source if Path(source).exists() else source.partition(":")[0]


def _files(source: str) -> list[str]:
    if Path(source).is_file():
        return [source]
    if Path(source).exists() or not any(mark in source for mark in "*?["):
        return []
    return sorted(path for path in glob.glob(source, recursive=True) if Path(path).is_file())


def _builder(source: str, files: Sequence[str]) -> str:
    for name in files:
        if Path(name).stat().st_size == 0:
            raise InputError(f"{name}: empty; a dataset needs records")
    found = {BUILDERS.get(_suffix(name.lower()), "") for name in files}
    if "" in found or len(found) > 1:
        known = ", ".join(BUILDERS)
        raise InputError(f"{source}: wants files of one kind of {known}")
    return found.pop()


def _suffix(name: str) -> str:
    return Path(name.removesuffix(".gz")).suffix


def _reason(error: BaseException) -> str:
    """What went wrong at first, in one line."""
    while error.__cause__:
        error = error.__cause__
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= LONGEST_REASON else f"{words[:LONGEST_REASON]}..."

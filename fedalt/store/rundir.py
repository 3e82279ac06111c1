"""The run directory: the names in it, who may write it, and how a run is found again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedalt.config import Config, load_config
from fedalt.errors import InputError
from fedalt.store.checkpoint import DRAFT, Checkpoint, load_latest, writing

CONFIG, RESULTS = "config.yaml", "results.json"
SHAPE = ("method", "lora", "seed")
"""Settings, or groups of them, that a checkpoint cannot be read without or is known by."""


def claim_run_dir(config: Config, resume: bool) -> Path:
    """The run's directory, found fit to be written before anything is.

    Raises:
        InputError: it is taken, cannot be made, or belongs to a run under another config.
    """
    out = Path(config.out)
    nearest = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise InputError(f"{out}: {nearest} is a file; choose another --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{out}: {nearest} is not writable; choose another --out")
    if not out.exists() or all(path.name.startswith(DRAFT) for path in out.iterdir()):
        return out
    if not resume:
        raise InputError(f"{out}: not empty; add --resume to go on there, or choose another --out")
    if not (out / CONFIG).is_file():
        raise InputError(f"{out}: not empty and no run of fedalt; choose another --out")
    refuse_changes(settings_of(load_config(out / CONFIG)), settings_of(config), out / CONFIG)
    return out


@contextmanager
def sole_writer(out: Path, patience: float = 0) -> Iterator[None]:
    """Keeps other processes from writing into a run while this one does.

    Args:
        out: the run directory.
        patience: seconds to wait for one that is at it.

    Raises:
        InputError: another process is running it.
    """
    lock = FileLock(out / f"{DRAFT}lock")
    with writing(out):
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            cure = "wait for it, or stop it"
            raise InputError(f"{out}: another process is running it; {cure}") from None
    try:
        yield
    finally:
        lock.release()


def settings_of(config: Config) -> dict[str, Any]:
    """Every setting that a resume must find as it was: all but where the run is kept and told."""
    return {k: v for k, v in config.flat().items() if k not in ("out", "report_to")}


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """``InputError`` names the first setting that is not what it was."""
    for key, value in now.items():
        if before.get(key, value) != value:
            change = f"{key} is {value!r} here and was {before[key]!r}"
            raise InputError(f"{where}: {change}; go on with the run's own settings")


def free_run_dir(config: Config) -> Path:
    """``runs/<data>-<method>``, numbered where that name is taken."""
    first = name = Path("runs") / f"{config.data.name}-{config.method}"
    number = 1
    while name.exists():
        number += 1
        name = first.with_name(f"{first.name}-{number}")
    return name


def load_run(run_dir: str | Path) -> tuple[Config, Checkpoint]:
    """The config of a run and its newest checkpoint.

    Raises:
        InputError: no such run, no checkpoint yet, or one that is damaged or of another run.
    """
    out = Path(run_dir)
    config = load_config(out / CONFIG)
    saved = load_latest(out)
    if saved is None:
        raise InputError(f"{out}: no checkpoint yet; let round 0 finish first")
    shape = {k: v for k, v in settings_of(config).items() if k.partition(".")[0] in SHAPE}
    refuse_changes(saved.record["settings"], shape, out / CONFIG)
    return config, saved

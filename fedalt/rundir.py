"""The run directory: the names in it, who may write it, and how a run is found again."""

from __future__ import annotations

import os
from pathlib import Path

from fedalt.checkpoint import DRAFT, Checkpoint, load_latest
from fedalt.config import Config, load_config
from fedalt.errors import InputError

CONFIG, METRICS, RESULTS = "config.yaml", "metrics.jsonl", "results.json"


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
    before, now = load_config(out / CONFIG).flat(), config.flat()
    for key in now:
        if key != "out" and before[key] != now[key]:
            change = f"{key} is {now[key]!r} here and was {before[key]!r}"
            raise InputError(f"{out / CONFIG}: {change}; resume with the run's own settings")
    return out


def free_run_dir(config: Config) -> Path:
    """``runs/<data>-<method>``, numbered where that name is taken."""
    first = name = Path("runs") / f"{Path(config.data.path).name}-{config.method}"
    number = 1
    while name.exists():
        number += 1
        name = first.with_name(f"{first.name}-{number}")
    return name


def load_run(run_dir: str | Path) -> tuple[Config, Checkpoint]:
    """The config of a run and its newest checkpoint.

    Raises:
        InputError: no such run, no checkpoint yet, or a damaged one.
    """
    out = Path(run_dir)
    config = load_config(out / CONFIG)
    saved = load_latest(out)
    if saved is None:
        raise InputError(f"{out}: no checkpoint yet; let round 0 finish first")
    return config, saved

"""What a run says while it goes: events to ``metrics.jsonl``, progress to standard error."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fedalt.errors import InputError, first_line
from fedalt.store.checkpoint import writing

METRICS, TIMES, ERRORS = "metrics.jsonl", "times.jsonl", "errors.log"
PACKAGES = ("fedalt", "torch", "transformers")
"""Whose versions are taken down."""


class Journal:
    """``metrics.jsonl``: a line an event, no clock in it, so equal runs write equal bytes.

    Beside it, ``times.jsonl`` has the seconds of every phase, with date and versions of every
    start, and ``errors.log`` the tracebacks of clients that failed; both differ from run to run.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        """Open the journal, keeping its first ``keep`` bytes: those of finished rounds.

        Raises:
            InputError: it cannot be written, or some of those bytes are gone.
        """
        self._run_dir, self._path, self.size = run_dir, run_dir / METRICS, keep
        with writing(self._path):
            self._file = open(self._path, "ab")  # noqa: SIM115  closed by __exit__
            found = os.fstat(self._file.fileno()).st_size
            if found < keep:
                raise InputError(
                    f"{self._path}: {found} bytes, the finished rounds wrote {keep}; restore it"
                )
            self._file.truncate(keep)
            _drop_cut_line(run_dir / TIMES)

    def start(self, number: int, seconds: float, device: str) -> None:
        """Append what it took to set up the rounds from ``number`` on, when, and by what."""
        versions = {name: _version(name) for name in PACKAGES}
        date = datetime.now().astimezone().isoformat(timespec="seconds")
        more = {"date": date, "device": device, "python": platform.python_version(), **versions}
        self.time(number, "start", "", seconds, **more)

    def time(self, number: int, phase: str, client: str, seconds: float, **more: str) -> None:
        """Append what a phase of round ``number`` took, of one client or of all."""
        row = {"round": number, "phase": phase, "client": client, "seconds": round(seconds, 4)}
        self._append(TIMES, json.dumps(row | more))

    def fail(self, number: int, client: str, error: Exception, **values: Any) -> str:
        """Note that a client failed in round ``number``; its traceback goes to ``errors.log``."""
        kind, first = type(error).__name__, first_line(error)
        reason = kind if first == kind else f"{kind}: {first}"
        self.write("fail", number, client, reason=reason, **values)
        self._append(ERRORS, "".join(traceback.format_exception(error)))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return reason

    def write(self, event: str, number: int, client: str, **values: Any) -> None:
        """Append one event of one client in round ``number``."""
        line = json.dumps({"event": event, "round": number, "client": client, **values})
        with writing(self._path):
            self.size += self._file.write(line.encode() + b"\n")

    def sync(self) -> None:
        """See that all events reached the disk, before a checkpoint counts on them."""
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def _append(self, name: str, text: str) -> None:
        path = self._run_dir / name
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what is not synced is of a round that will be run again
            self._file.close()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run out of its source tree
        return "not installed"


def _drop_cut_line(path: Path) -> None:
    """Take from a file of lines the last one if a full disk or a kill has cut it short."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def about(seconds: float) -> str:
    """A guess at a time as people say one: ``about 40 s``, ``about 12 min``, ``about 2.5 h``."""
    if seconds < 60:
        return f"about {max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 100 else f"about {seconds / 3600:.1f} h"


class Progress:
    """A bar of training steps on a terminal, and a line a round on standard error everywhere."""

    def __init__(self, rounds: int, steps_a_round: int, done: int) -> None:
        self._rounds, self._loss, self._scores = rounds, "-", list[float]()
        self._name = ""
        self._mark, self._took = time.monotonic(), list[float]()
        self._bar = tqdm(
            total=rounds * steps_a_round,
            initial=done * steps_a_round,
            unit="step",
            disable=None,  # on a terminal only
            leave=False,
        )

    def step(self) -> None:
        self._bar.update()

    def trained(self, losses: Sequence[float]) -> None:
        self._loss = f"{sum(losses) / len(losses):.3f}" if losses else "-"

    def evaluated(self, client: str, scores: Mapping[str, float]) -> None:
        self._name, value = next(iter(scores.items()))
        self._scores.append(value)
        self._bar.set_postfix_str(f"{client} {self._name} {value:.1f}")

    def end_round(self, number: int) -> None:
        line = [f"round {number}/{self._rounds}"]
        if number:
            line.append(f"train loss {self._loss}")
        if self._scores:
            line.append(f"{self._name} {sum(self._scores) / len(self._scores):.1f}")
            self._scores.clear()
        now = time.monotonic()
        line.append(f"{now - self._mark:.1f} s")
        if number:  # round 0 trains nothing and tells nothing of the others
            self._took.append(now - self._mark)
        self._mark = now
        if self._took and number < self._rounds:
            left = (self._rounds - number) * sum(self._took) / len(self._took)
            line.append(f"{about(left)} left")
        self.say("  ".join(line))

    def say(self, line: str) -> None:
        """A line on standard error, above the bar."""
        tqdm.write(line, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

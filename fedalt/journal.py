"""What a run says while it goes: events to ``metrics.jsonl``, progress to standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm


class Journal:
    """``metrics.jsonl``: a line an event, no clock in it, so equal runs write equal bytes."""

    def __init__(self, path: Path, keep: int) -> None:
        """Open the journal, keeping its first ``keep`` bytes: those of finished rounds."""
        self._file = open(path, "ab")  # noqa: SIM115  closed by __exit__
        self._file.truncate(keep)
        self.size = keep

    def write(self, event: str, number: int, client: str, **values: float) -> None:
        """Append one event of one client in round ``number``."""
        line = json.dumps({"event": event, "round": number, "client": client, **values})
        self.size += self._file.write(line.encode() + b"\n")

    def sync(self) -> None:
        """See that all events reached the disk, before a checkpoint counts on them."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Progress:
    """A bar of training steps on a terminal, and a line a round on standard error everywhere."""

    def __init__(self, rounds: int, steps_a_round: int, done: int) -> None:
        self._rounds, self._loss, self._rouge1 = rounds, 0.0, list[float]()
        self._mark = time.monotonic()
        self._bar = tqdm(
            total=rounds * steps_a_round,
            initial=done * steps_a_round,
            unit="step",
            disable=None,  # on a terminal only
            leave=False,
        )

    def step(self) -> None:
        self._bar.update()

    def trained(self, losses: list[float]) -> None:
        self._loss = sum(losses) / len(losses)

    def evaluated(self, client: str, rouge1: float) -> None:
        self._rouge1.append(rouge1)
        self._bar.set_postfix_str(f"{client} ROUGE-1 {rouge1:.1f}")

    def end_round(self, number: int) -> None:
        line = [f"round {number}/{self._rounds}"]
        if number:
            line.append(f"train loss {self._loss:.3f}")
        if self._rouge1:
            line.append(f"ROUGE-1 {sum(self._rouge1) / len(self._rouge1):.1f}")
            self._rouge1.clear()
        now = time.monotonic()
        line.append(f"{now - self._mark:.1f} s")
        self._mark = now
        tqdm.write("  ".join(line), file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

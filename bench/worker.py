"""A candidate in a process of its own, which answers every line with a line of JSON."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

ANSWER_S = 120.0  # what a worker may take to answer, loading included


class Failed(Exception):
    """A worker's own reason, in one line."""


class Worker:
    """A module of the benchmarks that is run with a job, as JSON, for its argument.

    Args:
        environment: all of the process's variables.
        answer_s: how long it may keep silent.
    """

    def __init__(
        self,
        module: str,
        job: Mapping[str, Any],
        environment: Mapping[str, str],
        answer_s: float = ANSWER_S,
    ) -> None:
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `end`
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env=environment,
        )
        self._answer_s = answer_s

    def answer(self, word: str = "") -> dict[str, Any]:
        """What the worker says next, after it was told a word.

        Raises:
            Failed: it met an error, or is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if word:
                self._process.stdin.write(f"{word}\n")
                self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], self._answer_s)[0]:
                raise Failed(f"no word within {self._answer_s:.0f} s")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        said = json.loads(line) if line else {"error": self._last_complaint()}
        if "error" in said:
            raise Failed(said["error"])
        return said

    def _last_complaint(self) -> str:
        self._complaints.seek(0)
        lines = self._complaints.read().strip().splitlines()
        return lines[-1] if lines else "its process ended without a word"

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._complaints.close()


def say(words: Mapping[str, Any]) -> None:
    """A worker's answer."""
    print(json.dumps(words), flush=True)

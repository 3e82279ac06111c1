"""Every finished round of a run, told to the trackers of ``report_to``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedalt.config import Config
from fedalt.errors import InputError, first_line
from fedalt.report import TRACKERS, Account, Tracker, points_of
from fedalt.store import write_atomic

TOLD = "trackers.json"


class Reporter:
    """Tells trackers what the journal has; one that fails is left alone until the next start.

    ``trackers.json`` of the run directory has what each was told, so that a later start goes on in
    the same runs of it, from the first round that it has not.
    """

    def __init__(self, config: Config, out: Path) -> None:
        """Make the trackers; nothing is written, and no server asked, before the first round.

        Raises:
            InputError: one's package is not installed, or ``trackers.json`` is damaged.
        """
        self._path, settings = out / TOLD, config.flat()
        try:
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else "{}"
            self._record = json.loads(text)
            self._accounts = {
                name: Account(out, settings, **self._record.get(name, {}))
                for name in config.report_to
            }
        except (ValueError, TypeError, AttributeError):
            cure = "remove it, and the trackers begin anew"
            raise InputError(f"{self._path}: is not what a run wrote; {cure}") from None
        self._trackers = {name: TRACKERS[name](self._accounts[name]) for name in config.report_to}

    @contextmanager
    def opened(self, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
        """What tells every tracker of the rounds up to one that it has not been told of.

        Args:
            say: prints a line; there is one for a tracker that fails.
        """
        failed = True
        try:
            yield lambda upto: self._tell(upto, say)
            failed = False
        finally:
            for name, tracker in self._trackers.items():
                try:
                    tracker.close(failed)
                except Exception as error:
                    say(f"{name} could not be closed: {_reason(error)}")

    def _tell(self, upto: int, say: Callable[[str], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            account = self._accounts[name]
            try:
                _tell(tracker, account, upto)
            except Exception as error:  # whatever it is, the run is worth more
                del self._trackers[name]
                say(f"{name} is told nothing more, --resume makes up for it: {_reason(error)}")
            finally:
                self._record[name] = {"told": account.told, "runs": account.runs}
                write_atomic(self._path, json.dumps(self._record, indent=1) + "\n")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _tell(tracker: Tracker, account: Account, upto: int) -> None:
    for number, runs in points_of(account.out, account.told + 1, upto).items():
        for name, values in runs.items():
            tracker.log(name, values, number)
        account.told = number

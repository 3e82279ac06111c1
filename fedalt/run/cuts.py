"""Records longer than ``data.max_length``: told in one line, with how many of whose."""

from __future__ import annotations

import warnings

from fedalt.errors import InputWarning
from fedalt.report import count

NAMED = 5
"""Clients that the line names; of more, how many they are."""


class Cuts:
    """Takes note of what is cut while clients' records become examples."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._new: dict[str, str] = {}
        self._seen: set[str] = set()

    def note(self, client: str, cut: int, records: int) -> None:
        """``cut`` of a client's ``records`` are too long; what it was noted for once stays."""
        if cut and client not in self._seen:
            self._seen.add(client)
            self._new[client] = f"{cut} of {records} of {client}"

    def tell(self) -> None:
        """An ``InputWarning`` of all noted since the last call, where there are any."""
        if not self._new:
            return
        named = list(self._new.values())
        if named[NAMED:]:
            named[NAMED:] = [f"and of {count(len(named) - NAMED, 'more client')}"]
        self._new = {}
        warnings.warn(
            f"data.max_length: records of more than {self._max_length} tokens are cut: "
            f"{', '.join(named)}; raise it to keep them whole",
            InputWarning,
            stacklevel=2,
        )

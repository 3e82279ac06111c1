"""What a client is: a stable id and a way to read its records, which are text or images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """One example of text: what is asked, what it is asked about, and the answer.

    ``options`` are the candidate answers of a multiple-choice question; ``output`` is one of them.
    """

    instruction: str
    output: str
    input: str = ""
    category: str = ""
    options: tuple[str, ...] = ()

    def fingerprint_bytes(self) -> bytes:
        """The record as bytes, to enter a hash."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class Parts:
    """A client's records, read."""

    train: Sequence[Any]
    test: Sequence[Any]

    def fingerprint(self) -> str:
        """SHA-256 over all records, by which a resume knows that the data is still the same."""
        digest = hashlib.sha256()
        for records in (self.train, self.test):
            digest.update(f"{len(records)}:".encode())
            for record in records:
                digest.update(record.fingerprint_bytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Client:
    """A participant. Its records are read when its turn comes and are not kept.

    Attributes:
        id: stable, and fit to be a file's name.
        read: reads the records, ``Record`` or ``ImageRecord``, anew.
    """

    id: str
    read: Callable[[], Parts]

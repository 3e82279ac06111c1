"""What a client's model answered, question by question, for those who read more than a mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedalt.data import ImageRecord

LENGTH = 300
"""Characters of a question or an answer; a longer one is cut."""


@dataclass
class Answers:
    """Filled by an evaluation that is handed it.

    Attributes:
        shown: questions that are kept word for word.
        given: the answer to every test record, as generated; of images, the class.
        scores: of texts, every answer's main score in percent; empty where the mean tells them.
    """

    shown: int
    given: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def take(self, given: Sequence[str], scores: Sequence[float] = ()) -> None:
        """Keep an evaluation's answers, in the order of its records."""
        self.given, self.scores = list(given), [round(score, 2) for score in scores]

    def event(self, records: Sequence[Any]) -> dict[str, Any]:
        """As the journal keeps them: ``test`` (how many), ``scores`` and ``shown``.

        Args:
            records: the test records. Some of them, evenly spread, are shown; the same ones each
                time.
        """
        places = sorted({i * len(records) // self.shown for i in range(self.shown)})
        shown = [
            {
                "asked": _cut(_question(records[place], place)),
                "gold": _cut(_gold(records[place])),
                "given": _cut(self.given[place]),
            }
            for place in places
        ]
        scores = {"scores": self.scores} if self.scores else {}
        return {"test": len(records), **scores, "shown": shown}


def _question(record: Any, place: int) -> str:
    if isinstance(record, ImageRecord):
        name = record.image.name if isinstance(record.image, Path) else f"image {place + 1}"
        return f"{record.category} {name}".strip()
    return f"{record.instruction}\n{record.input}".strip()


def _gold(record: Any) -> str:
    return record.label if isinstance(record, ImageRecord) else record.output


def _cut(text: str) -> str:
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 1]}…"

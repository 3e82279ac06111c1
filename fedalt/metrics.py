"""Scores of generated answers, in percent."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

ROUGE = ("rouge1", "rouge2", "rougeL")


def text_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F-measures, words stemmed) and exact match but for outer white space."""
    from rouge_score.rouge_scorer import RougeScorer  # here, since it takes a second to import

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    rows = [scorer.score(r, a) for a, r in zip(answers, references, strict=True)]
    scores = {name: 100 * sum(row[name].fmeasure for row in rows) / len(rows) for name in ROUGE}
    exact = sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
    return {**scores, "exact_match": 100 * exact / len(rows)}


def named_option(answer: str, options: Sequence[str]) -> int | None:
    """Which option a generated answer names: the first in it, the longest where two begin there.

    Case, punctuation and white space do not matter; words must match whole, so that ``no`` is not
    found in ``not``.

    Returns:
        The option's place, or None where the answer names none.
    """
    text = f" {_plain(answer)} "
    found = []
    for place, option in enumerate(options):
        begin = text.find(f" {_plain(option)} ")
        if begin >= 0:
            found.append((begin, -len(_plain(option)), place))
    return min(found)[2] if found else None


def _plain(text: str) -> str:
    """Lower case words and numbers, one space between them."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded))

"""Scores of generated answers, in percent."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

ROUGE = ("rouge1", "rouge2", "rougeL")


def text_scores(
    answers: Sequence[str], references: Sequence[str], each: list[float] | None = None
) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F-measures, words stemmed) and exact match but for outer white space.

    Args:
        answers: as generated; one or more.
        references: the right answers, in the same order.
        each: takes the ROUGE-1 of every answer, in percent.

    Returns:
        ``rouge1``, ``rouge2``, ``rougeL``, ``exact_match``: means over the answers, in percent.
    """
    from rouge_score.rouge_scorer import RougeScorer  # here, since it takes a second to import

    scorer = RougeScorer(ROUGE, use_stemmer=True)
    sums = dict.fromkeys((*ROUGE, "exact_match"), 0.0)
    for answer, reference in zip(answers, references, strict=True):
        found = scorer.score(reference, answer)
        for name, score in found.items():
            sums[name] += score.fmeasure
        sums["exact_match"] += answer.strip() == reference.strip()
        if each is not None:
            each.append(100 * found[ROUGE[0]].fmeasure)
    return {name: 100 * total / len(answers) for name, total in sums.items()}


def named_option(answer: str, options: Sequence[str]) -> str | None:
    """Which option a generated answer names: the first in it, the longest where two begin there.

    Case, white space and punctuation do not matter, but for options of the same words, such as
    ``C`` and ``C++``: of these it is the one whose punctuation is there too. Words must match
    whole, so that ``no`` is not found in ``not``. An answer that is an option, as written, names
    that option, be it of words or not.

    Returns:
        The option, or None where the answer names none.
    """
    if answer.strip() in options:
        return answer.strip()
    text, marked = f" {_words(answer)} ", f" {_words(answer, marks=True)} "
    found = []
    for place, option in enumerate(options):
        words, whole = _words(option), _words(option, marks=True)
        begin = text.find(f" {words} ")
        if words and begin >= 0:
            found.append((begin, -len(words), f" {whole} " not in marked, -len(whole), place))
    return options[min(found)[-1]] if found else None


def _words(text: str, marks: bool = False) -> str:
    """Words and numbers in lower case, one space between them; with ``marks`` also all else that
    is not white space, each character a word of its own. Accents stay with their letters."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    other = " {} " if marks else " "
    kept = [c if unicodedata.category(c)[0] in "LMN" else other.format(c) for c in folded]
    return " ".join("".join(kept).split())

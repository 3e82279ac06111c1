"""Scores of generated answers, in percent."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex

ROUGE = ("rouge1", "rouge2", "rougeL")
SPACELESS = r"[\p{L}&&[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]"
"""A letter of a script without spaces between words."""
WORD = rf"{SPACELESS}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--{SPACELESS}]+"
"""Letters, marks and digits of any script; of one without spaces, one letter with its marks."""


def text_scores(
    answers: Sequence[str], references: Sequence[str], each: list[float] | None = None
) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F-measures, words stemmed) and exact match but for outer white space.

    ROUGE counts the words of ``RougeWords``, which for ASCII text are those of `rouge_score`. No
    score tells an accented letter from the same letter followed by its accent.

    Args:
        answers: as generated; one or more.
        references: the right answers, in the same order.
        each: takes the ROUGE-1 of every answer, in percent.

    Returns:
        ``rouge1``, ``rouge2``, ``rougeL``, ``exact_match``: means over the answers, in percent.
    """
    from rouge_score.rouge_scorer import RougeScorer  # here, since it takes a second to import

    scorer = RougeScorer(ROUGE, tokenizer=RougeWords())
    sums = dict.fromkeys((*ROUGE, "exact_match"), 0.0)
    for answer, reference in zip(answers, references, strict=True):
        found = scorer.score(reference, answer)
        for name, score in found.items():
            sums[name] += score.fmeasure
        sums["exact_match"] += _composed(answer.strip()) == _composed(reference.strip())
        if each is not None:
            each.append(100 * found[ROUGE[0]].fmeasure)
    return {name: 100 * total / len(answers) for name, total in sums.items()}


class RougeWords:
    """The words of a text of any script, as a tokenizer of `rouge_score`.

    Words are runs of letters, marks and digits, in lower case: ``café`` is one. Chinese, Japanese
    kana, Thai, Lao, Khmer and Myanmar are written without spaces; there every letter with its marks
    is a word. Words in ASCII are then taken, and stemmed, as `rouge_score` takes them. Full-width
    letters and digits, and half-width kana, are as the usual ones.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """The words, in their order."""
        usual = regex.sub(
            r"[\uff00-\uffef]+", lambda wide: unicodedata.normalize("NFKC", wide[0]), text
        )
        words: list[str] = []
        for word in _found(WORD, _composed(_composed(usual).casefold())):
            words += self._ascii.tokenize(word) if word.isascii() else [word]
        return words


def named_option(answer: str, options: Sequence[str]) -> str | None:
    """Which option a generated answer names: the first in it, the longest where two begin there.

    Case, white space and punctuation do not matter, but for options of the same words, such as
    ``C`` and ``C++``: of these it is the one whose punctuation is there too. Words must match
    whole, so that ``no`` is not found in ``not``; in a script without spaces each letter is one.
    An answer that is an option, as written, names that option, be it of words or not.

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
    return " ".join(_found(rf"{WORD}|\S" if marks else WORD, folded))


def _found(pattern: str, text: str) -> list[str]:
    return regex.findall(pattern, text, regex.V1)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)

"""The small world that the built-in sample is written in: its words, facts and sentences.

A fact says who did what with which things, where and when. It is a mapping from field names to
words, and a sentence states the fields it holds:

    Mia bought three small red lamps at the market on Monday.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

Fact = dict[str, str]

WORDS: dict[str, tuple[str, ...]] = {
    "who": tuple(
        "Mia Tom Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Karl Lena Max Nora Oscar "
        "Paula Ralph Sara Theo Ursula Victor Wendy".split()
    ),
    "verb": tuple(
        "bought sold found lost painted carried cleaned hid broke fixed borrowed packed".split()
    ),
    "number": tuple("two three four five six seven eight nine ten eleven twelve twenty".split()),
    "kind": tuple("big small old new heavy light clean dirty".split()),
    "colour": tuple(
        "red blue green yellow black white brown pink grey purple orange silver".split()
    ),
    "thing": tuple(
        "lamps chairs tables books cups hats coats rings clocks brushes knives spoons plates "
        "baskets bottles mirrors drums flutes balls kites boats carts bells boxes".split()
    ),
    "place": tuple(
        "market school station garden harbour library kitchen forest bridge castle farm hotel "
        "museum office park theatre".split()
    ),
    "day": tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
}
FIELDS = tuple(WORDS)
FIELD_OF = {word: field for field, words in WORDS.items() for word in words}

REQUIRED = ("who", "verb", "thing")
ORDERS = ("plain", "day first", "place first")


def random_fact(rng: random.Random, keep: float = 0.6, always: Sequence[str] = REQUIRED) -> Fact:
    """A random fact. A field outside `always` is present with probability `keep`."""
    return {
        field: rng.choice(words)
        for field, words in WORDS.items()
        if field in always or rng.random() < keep
    }


def sentence(fact: Fact, order: str = "plain") -> str:
    """The sentence that states `fact`, with the day or the place in front if so ordered."""
    noun_phrase = [fact[field] for field in ("number", "kind", "colour", "thing") if field in fact]
    place = f"at the {fact['place']}" if "place" in fact else ""
    day = f"on {fact['day']}" if "day" in fact else ""
    front = {"day first": day, "place first": place}.get(order, "")
    back = [phrase for phrase in (place, day) if phrase and phrase != front]
    opening = [f"{front[0].upper()}{front[1:]},"] if front else []
    return " ".join([*opening, fact["who"], fact["verb"], *noun_phrase, *back]) + "."


def random_sentence(fact: Fact, rng: random.Random) -> str:
    """The sentence that states `fact`, in a random order (the plain one half of the time)."""
    return sentence(fact, rng.choice(("plain", *ORDERS)))

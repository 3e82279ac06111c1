"""The built-in sample federation: eight clients who keep notes, each in its own way.

Every record says `Note` and gives a sentence of the small world; the answer is the note that the
client would take of it. Two things have to be learned:

- a *shared* skill: all clients write six numbers and six colours in one secret code, in which every
  number stands for another number and every colour for another colour;
- a *personal* rule: which fields of the sentence the client notes down, in which order and with
  which separator.

The instruction is the same for all, so the personal rule cannot be read off the prompt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from fedalt.data.world import WORDS, Fact, random_fact, random_sentence

TRAIN_RECORDS = 80
TEST_RECORDS = 50
INSTRUCTION = "Note"
CODED = {"number": WORDS["number"][:6], "colour": WORDS["colour"][:6]}
STATED_FIELDS = ("who", "verb", "number", "colour", "thing", "place", "day")


@dataclass(frozen=True)
class Rule:
    """What a client notes down: `fields` in this order, joined by `separator`."""

    fields: tuple[str, ...]
    separator: str = " "
    labelled: bool = False

    def note(self, fact: Fact) -> str:
        """The note that this rule makes of `fact`."""
        parts = [f"{name}: {fact[name]}" if self.labelled else fact[name] for name in self.fields]
        return self.separator.join(parts)


RULES: dict[str, Rule] = {
    "stock": Rule(("thing", "number", "colour")),
    "shelf": Rule(("thing", "colour", "number"), ", "),
    "map": Rule(("place", "colour", "number"), " - "),
    "route": Rule(("place", "number", "colour"), " / "),
    "form": Rule(("thing", "number", "colour"), ", ", labelled=True),
    "ledger": Rule(("who", "number", "colour"), ", "),
    "calendar": Rule(("day", "number", "colour", "thing"), "; "),
    "diary": Rule(("day", "colour", "number"), " | "),
}


def secret_code(rng: random.Random) -> dict[str, str]:
    """For every number and colour of the sample, another number or colour."""
    code: dict[str, str] = {}
    for words in CODED.values():
        shuffled = list(words)
        while any(word == other for word, other in zip(words, shuffled, strict=True)):
            rng.shuffle(shuffled)
        code.update(zip(words, shuffled, strict=True))
    return code


def sample_clients(seed: int = 0) -> dict[str, dict[str, list[dict[str, str]]]]:
    """The eight clients: client id -> {"train": records, "test": records}.

    Args:
        seed: draws the secret code and all sentences; the rules are always the same.

    Returns:
        Records are plain dicts with `instruction`, `input`, `output` and `category` (the client's
        id). No sentence occurs twice with one client, so that none of a client's test records is
        among its train records.
    """
    code = secret_code(random.Random(f"code {seed}"))
    return {name: _client(name, rule, code, seed) for name, rule in RULES.items()}


def _client(
    name: str, rule: Rule, code: dict[str, str], seed: int
) -> dict[str, list[dict[str, str]]]:
    rng = random.Random(f"{name} {seed}")
    records: dict[str, dict[str, str]] = {}
    while len(records) < TRAIN_RECORDS + TEST_RECORDS:
        fact = random_fact(rng, keep=0.3, always=STATED_FIELDS)
        fact.update({field: rng.choice(words) for field, words in CODED.items()})
        text = random_sentence(fact, rng)
        note = rule.note({field: code.get(word, word) for field, word in fact.items()})
        records[text] = {
            "instruction": INSTRUCTION,
            "input": text,
            "output": note,
            "category": name,
        }
    rows = list(records.values())
    return {"train": rows[:TRAIN_RECORDS], "test": rows[TRAIN_RECORDS:]}

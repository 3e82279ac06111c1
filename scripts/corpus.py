"""The text that the built-in base model is pre-trained on: instructions and answers, all generated.

`FAMILIES` maps the name of a task family to its share of the corpus and the function that draws one
of its records. Free text is a record without instruction and input.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import english

from fedalt.config.schema import DataConfig
from fedalt.data.clients import Record
from fedalt.data.tokens import render_prompt
from fedalt.data.world import FIELD_OF, ORDERS, WORDS, random_fact, random_sentence, sentence

Family = tuple[float, Callable[[random.Random], Record]]  # share of the corpus, how to draw

WORLD_WORDS = tuple(FIELD_OF)
SEPARATORS = (" ", ", ", " / ", " - ", "; ", " | ")
ASKED = {  # field: (its name in general words, a question for it)
    "who": ("person", "Who {verb} the {thing}?"),
    "number": ("number", "How many {thing} were there?"),
    "colour": ("colour", "What colour were the {thing}?"),
    "kind": ("quality", "What were the {thing} like?"),
    "thing": ("object", "What was it that {who} {verb}?"),
    "place": ("place", "Where was {who}?"),
    "day": ("time", "When did {who} do it?"),
}


def render(record: Record) -> tuple[str, str]:
    """The prompt and the answer of `record`; free text has an empty prompt."""
    prompt = render_prompt(record, DataConfig()) if record.instruction else ""
    return prompt, record.output


def _word(rng: random.Random) -> str:
    """A word of the world, of common English, or made up; sometimes with a capital."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(WORLD_WORDS)
    word = english.any_word(rng) if kind < 0.7 else english.made_up_word(rng)
    return word.capitalize() if rng.random() < 0.2 else word


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    return [_word(rng) for _ in range(rng.randint(low, high))]


def _text(rng: random.Random) -> str:
    """A sentence or a question, of the world or of general English."""
    kind = rng.random()
    if kind < 0.4:
        return random_sentence(random_fact(rng), rng)
    return english.statement(rng) if kind < 0.8 else english.question(rng)


def _options(choices: list[str]) -> str:
    return "OPTIONS:\n- " + "\n- ".join(choices)


def _yes_no(rng: random.Random, question: str, truth: bool) -> Record:
    choices = ["yes", "no"]
    rng.shuffle(choices)
    gap = rng.choice(("\n", "\n\n"))
    return Record(f"{question}{gap}{_options(choices)}", "yes" if truth else "no")


def copy(rng: random.Random) -> Record:
    """The input, word for word."""
    text = " ".join(_words(rng, 3, 9)) if rng.random() < 0.7 else _text(rng)
    return Record(rng.choice(("Copy the text.", "Copy", "Repeat this.")), text, text)


def words(rng: random.Random) -> Record:
    """An operation on a list of words."""
    items = _words(rng, 2, 7)
    separator = rng.choice(SEPARATORS[1:])
    left, right = rng.choice(("()", "[]", "<>"))
    instruction, answer = rng.choice(
        (
            ("Reverse the words.", " ".join(reversed(items))),
            ("Give the first word.", items[0]),
            ("Give the last word.", items[-1]),
            ("Drop the first word.", " ".join(items[1:])),
            ("Drop the last word.", " ".join(items[:-1])),
            ("Swap the first and the last word.", " ".join([items[-1], *items[1:-1], items[0]])),
            (f"Join the words with {separator.strip()}", separator.join(items)),
            (f"Put the words in {left} {right}", f"{left}{' '.join(items)}{right}"),
        )
    )
    return Record(instruction, answer, " ".join(items))


def tag(rng: random.Random) -> Record:
    """The field that every word of the world belongs to."""
    items = rng.choices(WORLD_WORDS, k=rng.randint(2, 6))
    answer = ", ".join(f"{FIELD_OF[item]}: {item}" for item in items)
    return Record("Name the field of every word.", answer, " ".join(items))


def dictionary(rng: random.Random) -> Record:
    """Words translated by a dictionary that the instruction gives."""
    keys = list({english.made_up_word(rng): None for _ in range(rng.randint(3, 6))})
    meanings = dict(zip(keys, (_word(rng) for _ in keys), strict=True))
    asked = rng.sample(keys, rng.randint(1, len(keys)))
    instruction = "Translate: " + ", ".join(f"{key} = {word}" for key, word in meanings.items())
    answer = [meanings[key] for key in asked]
    return Record(instruction, " ".join(answer), " ".join(asked))


def ask(rng: random.Random) -> Record:
    """One field of a sentence, asked for by its name or by a question."""
    fact = random_fact(rng)
    field = rng.choice(list(fact))
    question = ASKED[field][1].format_map(fact) if field in ASKED else ""
    instruction = question if question and rng.random() < 0.6 else f"Give the {field}."
    return Record(instruction, fact[field], random_sentence(fact, rng))


def listing(rng: random.Random) -> Record:
    """Several fields of a sentence in the order asked, plain or labelled."""
    fact = random_fact(rng, keep=0.7)
    fields = rng.sample(list(fact), rng.randint(2, min(5, len(fact))))
    separator = rng.choice(SEPARATORS)
    labelled = rng.random() < 0.3
    parts = [f"{field}: {fact[field]}" if labelled else fact[field] for field in fields]
    how = f" with {separator.strip()}" if separator.strip() else ""
    instruction = f"{'Label' if labelled else 'List'} {', '.join(fields)}{how}"
    return Record(instruction, separator.join(parts), random_sentence(fact, rng))


def say(rng: random.Random) -> Record:
    """A sentence made of labelled facts, or of the bare words."""
    fact = random_fact(rng)
    fields = rng.sample(list(fact), len(fact))
    if rng.random() < 0.6:
        given = "; ".join(f"{field}: {fact[field]}" for field in fields)
    else:
        given = ", ".join(fact[field] for field in fields)
    return Record("Make a sentence of these facts.", sentence(fact), given)


def pick(rng: random.Random) -> Record:
    """One of several options that answers a question about a sentence."""
    fact = random_fact(rng)
    field = rng.choice([field for field in fact if field in ASKED])
    others = [word for word in WORDS[field] if word != fact[field]]
    choices = [fact[field], *rng.sample(others, rng.randint(1, 4))]
    rng.shuffle(choices)
    question = ASKED[field][1].format_map(fact)
    parts = [random_sentence(fact, rng), question]
    if rng.random() < 0.3:
        parts.reverse()
    return Record("\n".join([*parts, _options(choices)]), fact[field])


def sort_question(rng: random.Random) -> Record:
    """What sort of thing a question asks for."""
    fact = random_fact(rng, keep=1.0)
    field = rng.choice(list(ASKED))
    choices = [name for name, _ in ASKED.values()]
    rng.shuffle(choices)
    question = ASKED[field][1].format_map(fact)
    ask_sort = rng.choice(("What does this question ask for?", "What would the answer be?"))
    return Record(f"{question}\n{ask_sort}\n{_options(choices)}", ASKED[field][0])


def check(rng: random.Random) -> Record:
    """Whether a second statement follows from a first one."""
    fact = random_fact(rng)
    shown = [field for field in fact if field in ("who", "verb", "thing") or rng.random() < 0.6]
    claim = {field: fact[field] for field in fact if field in shown}
    truth = rng.random() < 0.5
    if not truth:
        field = rng.choice(list(claim))
        claim[field] = rng.choice([word for word in WORDS[field] if word != fact[field]])
    first, second = random_sentence(fact, rng), random_sentence(claim, rng)
    form = rng.choice(
        (
            f"{first}\nIs it true that {second[:-1]}?",
            f"Sentence 1: {first}\nSentence 2: {second}\n"
            "If the first sentence is true, is the second one true too?",
            f'Does "{second}" follow from "{first}"?',
        )
    )
    return _yes_no(rng, form, truth)


def same(rng: random.Random) -> Record:
    """Whether two sentences say the same."""
    fact = random_fact(rng)
    other = dict(fact)
    truth = rng.random() < 0.5
    if not truth:
        field = rng.choice(list(fact))
        other[field] = rng.choice([word for word in WORDS[field] if word != fact[field]])
    first, second = (sentence(which, rng.choice(ORDERS)) for which in (fact, other))
    asked = rng.choice(
        (
            "Do these two sentences say the same?",
            "Do the sentences mean the same thing?",
            "Is this the same fact in both sentences?",
        )
    )
    parts = [f"{first}\n{second}", asked]
    if rng.random() < 0.3:
        parts = [asked, f"Sentence 1: {first}\nSentence 2: {second}"]
    return _yes_no(rng, "\n".join(parts), truth)


def shared_word(rng: random.Random) -> Record:
    """Whether a word occurs in both of two texts."""
    first, second = _text(rng), _text(rng)
    inside = [word for word in first.rstrip(".?!").split() if word.isalpha()]
    word = rng.choice(inside)
    if rng.random() < 0.5:
        cut = second.split()
        cut.insert(rng.randrange(1, len(cut)), word)
        second = " ".join(cut)
    truth = word in second.rstrip(".?!").replace(",", "").split()
    return _yes_no(rng, f'{first}\n{second}\nIs "{word}" in both of these sentences?', truth)


def punctuate(rng: random.Random) -> Record:
    """A text whose punctuation, and perhaps capitals, went missing."""
    answer = _text(rng)
    text = "".join(letter for letter in answer if letter not in ".,?!")
    if rng.random() < 0.4:
        return Record("Fix the capitals and the punctuation.", answer, text.lower())
    asked = rng.choice(("Fix the punctuation.", "Put the punctuation back."))
    if rng.random() < 0.5:
        return Record(f"{asked}\n\n{text}", answer)
    return Record(asked, answer, text)


def free_text(rng: random.Random) -> Record:
    """Plain text without an instruction."""
    return Record("", " ".join(_text(rng) for _ in range(rng.randint(1, 3))))


FAMILIES: dict[str, Family] = {
    "copy": (0.06, copy),
    "words": (0.14, words),
    "tag": (0.04, tag),
    "dictionary": (0.12, dictionary),
    "ask": (0.08, ask),
    "listing": (0.20, listing),
    "say": (0.07, say),
    "pick": (0.06, pick),
    "sort question": (0.02, sort_question),
    "check": (0.05, check),
    "same": (0.05, same),
    "shared word": (0.02, shared_word),
    "punctuate": (0.06, punctuate),
    "free text": (0.03, free_text),
}


def draw(rng: random.Random) -> tuple[str, Record]:
    """A record of a random family, with the family's name."""
    shares = [share for share, _ in FAMILIES.values()]
    (name,) = rng.choices(list(FAMILIES), shares)
    return name, FAMILIES[name][1](rng)


def tokenizer_text(rng: random.Random) -> str:
    """A text to learn the vocabulary from.

    Half of it is general English. Some is lists of numbers and colours, so that each of them is
    one token with or without a blank before it.
    """
    kind = rng.random()
    if kind < 0.5:
        return f"{english.statement(rng)} {english.question(rng)}"
    if kind < 0.6:
        return _options(rng.sample(WORDS["number"] + WORDS["colour"], 8))
    return "".join(render(draw(rng)[1]))

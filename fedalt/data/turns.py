"""A chat in the base's own template: its tokens, and which of them are the assistant's.

Templates that mark what is generated (``{% generation %}``) tell by themselves. Of others, an
answer is what changes in the text when another one stands in its place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.data.chats import Chat
from fedalt.errors import InputError, first_line

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
OTHER = "\ue000another answer\ue000"
"""What stands in an answer's place; of characters that no text has."""
BEGINNING = 40
"""Characters of a chat that a message names it by."""


@dataclass(frozen=True)
class Turns:
    """A chat in token ids: what is read before the first token that counts, and all from there on.

    Attributes:
        counted: by token of ``answer``, whether it is the assistant's.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    counted: tuple[bool, ...]


def encode_chat(chat: Chat, tokenizer: Any, last: bool = False) -> Turns:
    """The tokens of a chat.

    A turn's tokens are its text's and the special token that ends it; where the template ends the
    last one with none, the tokenizer's end token follows. A template that knows of thoughts is told
    that there are none.

    Args:
        last: whether the last turn alone counts.

    Raises:
        InputError: the base has no chat template or one that refuses the chat, its tokenizer does
            not tell where a token is in the text, or which tokens are the assistant's cannot be
            told.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "data.prompt: the base has no chat template, which chats want; take an instruct base, "
            "or records with instruction and output"
        )
    if not tokenizer.is_fast:
        raise InputError("data.prompt: chats want a base with a tokenizer.json")
    whole = _apply(chat, tokenizer, chat.messages)
    if any(words not in whole for _, words in chat.messages[-2:]):
        raise _unknown(chat)
    if MARKED.search(str(tokenizer.chat_template)):
        ids, counted = _marked(chat, tokenizer)
    else:
        ids, counted = _told_apart(chat, tokenizer, whole)
    _mend_ends(ids, counted, tokenizer)
    places = [place for place, yes in enumerate(counted) if yes]
    if not places:
        raise _unknown(chat)
    if last:
        before = [place for place in range(places[-1]) if not counted[place]]
        places = list(range(before[-1] + 1 if before else 0, places[-1] + 1))
    ids, counted = ids[: places[-1] + 1], counted[: places[-1] + 1]
    if not is_special(tokenizer, ids[-1]):
        ids.append(tokenizer.eos_token_id)
        counted.append(True)
    first = places[0]
    return Turns(tuple(ids[:first]), tuple(ids[first:]), tuple(counted[first:]))


def is_special(tokenizer: Any, token: int) -> bool:
    """Whether a token is no text, such as the end of a turn."""
    if token == tokenizer.eos_token_id:
        return True
    added = tokenizer.added_tokens_decoder.get(token)
    return bool(added and added.special)


def _marked(chat: Chat, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """By what the template marks as generated."""
    found = _apply(
        chat,
        tokenizer,
        chat.messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(found["input_ids"]), [bool(each) for each in found["assistant_masks"]]


def _told_apart(chat: Chat, tokenizer: Any, whole: str) -> tuple[list[int], list[bool]]:
    """By putting another answer in the place of each."""
    spans = []
    for place, (role, words) in enumerate(chat.messages):
        if role == "assistant":
            turns = [*chat.messages[:place], (role, OTHER), *chat.messages[place + 1 :]]
            before, found, after = _apply(chat, tokenizer, turns).partition(OTHER)
            if not found or before + words + after != whole:
                raise _unknown(chat)
            spans.append((len(before), len(before) + len(words)))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    counted = [
        any(stop > start and begin < end for start, end in spans)
        for begin, stop in found["offset_mapping"]
    ]
    return list(found["input_ids"]), counted


def _apply(chat: Chat, tokenizer: Any, messages: Sequence[tuple[str, str]], **options: Any) -> Any:
    from jinja2 import TemplateError

    turns = [{"role": role, "content": text} for role, text in messages]
    options = {"tokenize": False, "enable_thinking": False, **options}
    try:
        return tokenizer.apply_chat_template(turns, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"data.prompt: the base's chat template refuses {_named(chat)}: {first_line(error)}"
        ) from None


def _mend_ends(ids: list[int], counted: list[bool], tokenizer: Any) -> None:
    """Have every turn end with the special token that is its last, or that follows it.

    White space behind that does not count, white space before it does.
    """
    ends = [i for i in range(len(ids)) if counted[i] and not any(counted[i + 1 : i + 2])]
    for last in ends:
        while counted[last] and not tokenizer.decode([ids[last]]).strip():
            counted[last] = False
            last -= 1
        if is_special(tokenizer, ids[last]):
            continue
        after = last + 1
        while after < len(ids) and not tokenizer.decode([ids[after]]).strip():
            after += 1
        if after < len(ids) and is_special(tokenizer, ids[after]):
            counted[last + 1 : after + 1] = [True] * (after - last)


def _unknown(chat: Chat) -> InputError:
    return InputError(
        "data.prompt: the base's chat template does not tell which tokens are the assistant's in "
        f"{_named(chat)}; mark them in it with {{% generation %}}, or split the chat into its turns"
    )


def _named(chat: Chat) -> str:
    words = " ".join(chat.messages[0][1].split())
    return f"the chat {words[:BEGINNING]!r}" + ("..." if words[BEGINNING:] else "")

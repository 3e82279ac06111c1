"""Chats: rows with ``messages`` as records, and instructions as chats of one turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fedalt.data.records import Record
from fedalt.errors import InputError, require_encodable

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Chat:
    """One conversation, which ends with the assistant's turn.

    Attributes:
        messages: role and text of each turn.
        category: as a ``Record`` has it; of options there are none.
    """

    messages: tuple[tuple[str, str], ...]
    category: str = ""
    options: tuple[str, ...] = ()

    @property
    def instruction(self) -> str:
        """What the last answer answers."""
        return self.messages[-2][1]

    @property
    def input(self) -> str:
        return ""

    @property
    def output(self) -> str:
        """The assistant's last turn."""
        return self.messages[-1][1]

    def fingerprint_bytes(self) -> bytes:
        """The record as bytes, to enter a hash."""
        return json.dumps(asdict(self)).encode()


def as_chat(record: Record) -> Chat:
    """An instruction with its input as the user's one turn, its output as the answer."""
    asked = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
    return Chat((("user", asked), ("assistant", record.output)), record.category)


def chat_record(row: dict[str, Any], where: str, called: str) -> Chat:
    """The chat that a row holds in its field ``messages``; texts lose their outer white space.

    Args:
        row: ``messages``: a list of objects with ``role`` and ``content``, which is text or a list
            of parts of type ``text``; and ``category``, if there.
        where: what a message calls the row, such as ``FILE:LINE``; ``called``: the field.

    Raises:
        InputError: another role or kind of content, an empty turn, a system's text that is not the
            first message, or a chat that does not end with an answer.
    """
    messages = row["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise InputError(f"{where}: {called} must be a list of two messages or more")
    turns = tuple(_turns(messages, f"{where}: {called}"))
    if turns[-1][0] != "assistant" or turns[-2][0] == "system":
        raise InputError(
            f"{where}: {called} must end with a question and the assistant's answer; remove what "
            "follows that, or the row"
        )
    category = row.get("category")
    category = "" if category is None else str(category)
    require_encodable(category, f"{where}: field 'category'")
    return Chat(turns, category)


def _turns(messages: list[Any], what: str) -> Iterator[tuple[str, str]]:
    for number, message in enumerate(messages, start=1):
        place = f"{what}: message {number}"
        if not isinstance(message, dict):
            raise InputError(f"{place} must be an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise InputError(f"{place}: role must be one of {', '.join(ROLES)}, got {role!r}")
        if role == "system" and number > 1:
            raise InputError(f"{place}: only the first may be the system's; move its text there")
        text = _text(message.get("content"), place)
        require_encodable(text, place)
        if not text.strip():
            raise InputError(f"{place} is empty")
        yield role, text.strip()


def _text(content: Any, place: str) -> str:
    """A message's text, its parts one after another."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{place}: content must be text or a list of parts of type text")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{place}: a part of type {kind!r}; only parts of type text are read")
    return "".join(part["text"] for part in content)

"""OpenAI's chat-completions and completions protocol: what is asked, and what is answered."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.errors import InputError

DEFAULT_TOKENS = 128
# What clients may say that changes no answer.
IGNORED = {"user", "metadata", "store", "n", "stream_options"}
KNOWN = {"model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "stream"}


@dataclass(frozen=True)
class Asked:
    """A checked request.

    Attributes:
        text: the prompt of a completion; of a chat, its messages, a blank line between them.
    """

    client: str
    text: str
    chat: bool
    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    stream: bool


def read(body: Any, chat: bool) -> Asked:
    """A request's JSON; ``InputError`` names the field that does not fit."""
    if not isinstance(body, dict):
        raise InputError("the body must be a JSON object")
    wanted = "messages" if chat else "prompt"
    if unknown := sorted(body.keys() - KNOWN - IGNORED - {wanted}):
        raise InputError(f"{unknown[0]} is not known here; take it out")
    if body.get("n", 1) != 1:
        raise InputError(f"n must be 1, got {body['n']!r}")
    if not isinstance(body.get("model"), str):
        raise InputError(f"model must be a client's id, got {body.get('model')!r}")
    text = _messages(body.get(wanted)) if chat else body.get(wanted)
    if not isinstance(text, str) or not text:
        raise InputError(f"prompt must be a text, got {text!r}")
    stop = body.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(w, str) and w for w in stop):
        raise InputError(f"stop must be a text or a list of texts, got {stop!r}")
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise InputError(f"stream must be true or false, got {stream!r}")
    tokens = body.get("max_completion_tokens") or body.get("max_tokens")
    tokens = DEFAULT_TOKENS if tokens is None else tokens
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise InputError(f"max_tokens must be a whole number of at least 1, got {tokens!r}")
    return Asked(
        body["model"],
        text,
        chat,
        tokens,
        _number(body, "temperature", 0.0, 0.0, 2.0),
        _number(body, "top_p", 1.0, 0.01, 1.0),
        tuple(stop),
        stream,
    )


def _messages(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"messages must be a list of messages, got {messages!r}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"messages must each have a text as content, got {message!r}")
    return "\n\n".join(message["content"] for message in messages)


def _number(body: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InputError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}")
    return float(value)


class Reply:
    """The JSON of one answer, whole or in chunks, under one id."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._made = int(time.time())

    def whole(self, text: str, end: str, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """A finished answer."""
        said = {"message": {"role": "assistant", "content": text}}
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        }
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return self._with(kind, said if self._asked.chat else {"text": text}, end) | {
            "usage": usage
        }

    def chunk(self, text: str, end: str) -> dict[str, Any]:
        """A piece of a streamed answer."""
        said = {"delta": {"role": "assistant", "content": text}}
        kind = "chat.completion.chunk" if self._asked.chat else "text_completion"
        return self._with(kind, said if self._asked.chat else {"text": text}, end)

    def _with(self, kind: str, said: dict[str, Any], end: str) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": end or None}
        head = {"id": self._id, "object": kind, "created": self._made}
        return {**head, "model": self._asked.client, "choices": [choice]}


def error(message: str, kind: str) -> dict[str, Any]:
    """What is answered in place of one, in one line."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def models(ids: Sequence[str]) -> dict[str, Any]:
    """The clients as a list of models."""
    rows = [{"id": client, "object": "model", "created": 0, "owned_by": "fedalt"} for client in ids]
    return {"object": "list", "data": rows}

"""Requests of many clients, decoded together by one thread, a batch after another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalt.errors import InputError, first_line
from fedalt.serving.many import ClientsModel

MOST_ROWS = 32
"""Requests in one batch."""
MOST_WAITING = 256
"""Requests that wait; more are refused."""
HALF_A_LETTER = "\ufffd"


class Busy(RuntimeError):
    """Too many requests wait, or the decoder is closed."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer; the last one says why it ended: ``stop``, ``length`` or ``error``."""

    text: str
    end: str = ""
    tokens: int = 0  # of the whole answer, told with the end


@dataclass
class Request:
    """One prompt of a client.

    Attributes:
        emit: takes the answer's pieces, in the decoder's thread.
        gone: set by whoever asked and does not listen any more.
    """

    client: str
    prompt: Sequence[int]
    emit: Callable[[Piece], None]
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    gone: bool = False

    @property
    def sampling(self) -> tuple[float, float]:
        """What the rows of a batch must have in common."""
        return (self.temperature, self.top_p) if self.temperature else (0.0, 1.0)


class Decoder:
    """Decodes what waits, in the order of arrival; requests that sample alike share a batch."""

    def __init__(self, model: ClientsModel, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._waiting: list[Request] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fedalt-decoder", daemon=True)
        self._thread.start()

    def put(self, request: Request) -> None:
        """Have a request answered; ``Busy`` where too many wait."""
        with self._changed:
            if self._closed or len(self._waiting) >= MOST_WAITING:
                raise Busy(f"{len(self._waiting)} requests wait; try again later")
            self._waiting.append(request)
            self._changed.notify()

    def close(self) -> None:
        """End the batch at work and what waits with an error, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            rows = [_Row(request, self._tokenizer) for request in batch]
            try:
                self._decode(rows)
                reason = "the server is closing"
            except Exception as error:  # such as out of memory: the next batch may be smaller
                reason = first_line(error)
            for row in rows:
                row.end("error", reason)
        for request in self._waiting:
            request.emit(Piece("the server is closing", "error"))

    def _next(self) -> list[Request]:
        """The next batch; none once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            first = self._waiting[0].sampling
            batch = [request for request in self._waiting if request.sampling == first][:MOST_ROWS]
            self._waiting = [request for request in self._waiting if request not in batch]
            return batch

    def _decode(self, rows: Sequence[_Row]) -> None:
        requests = [row.request for row in rows]
        length = max(len(request.prompt) for request in requests)
        pad = self._tokenizer.pad_token_id
        ids = torch.full((len(rows), length), pad)
        mask = torch.zeros_like(ids)
        for i, request in enumerate(requests):
            ids[i, length - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[i, length - len(request.prompt) :] = 1
        device = next(self._model.parameters()).device
        temperature, top_p = requests[0].sampling
        sampling = {"temperature": temperature, "top_p": top_p} if temperature else {}

        def follow(tokens: Tensor, scores: object, **more: object) -> Tensor:
            ended = [
                row.take(token) or self._closed
                for row, token in zip(rows, tokens[:, -1].tolist(), strict=True)
            ]
            return torch.tensor(ended, device=tokens.device)

        self._model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            clients=[request.client for request in requests],
            max_new_tokens=max(request.max_tokens for request in requests),
            do_sample=bool(temperature),
            num_beams=1,
            stopping_criteria=[follow],
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=pad,
            **sampling,
        )


class _Row:
    """One answer as it grows: its text, held back where a letter or a stop word may go on."""

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self.request, self._tokenizer = request, tokenizer
        self._tokens: list[int] = []
        self._text, self._sent, self._ended = "", 0, False

    def take(self, token: int) -> bool:
        """The next token; returns whether the answer has ended."""
        if self._ended or self.request.gone:
            return True
        if token == self._tokenizer.eos_token_id:
            self.end("stop")
            return True
        self._tokens.append(token)
        self._text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        found = [at for word in self.request.stop if (at := self._text.find(word)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.end("stop")
        elif len(self._tokens) == self.request.max_tokens:
            self.end("length")
        else:
            self._send(len(self._text) - _open_end(self._text, self.request.stop))
        return self._ended

    def end(self, why: str, reason: str = "") -> None:
        """Send what is left, once."""
        if not self._ended:
            self._ended = True
            text = reason or self._text[self._sent :]
            self.request.emit(Piece(text, why, len(self._tokens)))

    def _send(self, upto: int) -> None:
        if upto > self._sent:
            self.request.emit(Piece(self._text[self._sent : upto]))
            self._sent = upto


def _open_end(text: str, words: Iterable[str]) -> int:
    """How many letters at the end may yet change, or begin a stop word."""
    unsure = len(text) - len(text.rstrip(HALF_A_LETTER))
    lengths = [n for word in words for n in range(1, len(word)) if text.endswith(word[:n])]
    return max([unsure, *lengths])


def check_prompt(tokens: Sequence[int], max_tokens: int, model: Any) -> None:
    """``InputError`` for a prompt that leaves the model's context no room."""
    most = getattr(model.config, "max_position_embeddings", None)
    if not tokens:
        raise InputError("the prompt is empty")
    if most is not None and len(tokens) + max_tokens > most:
        raise InputError(
            f"the prompt's {len(tokens)} tokens and max_tokens {max_tokens} are more than the "
            f"model's {most}"
        )

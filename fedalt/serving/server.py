"""``fedalt serve``: a run's clients over HTTP, as models of OpenAI's protocol."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fedalt.config import DataConfig
from fedalt.data import Record, encode
from fedalt.errors import InputError, first_line, not_installed
from fedalt.run import joined_clients
from fedalt.serving import protocol
from fedalt.serving.decoding import Busy, Decoder, Piece, Request, check_prompt
from fedalt.serving.many import ClientsModel, load_clients
from fedalt.store import load_run


def serve(run_dir: str | Path, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answer for all clients of a run, until interrupted.

    ``POST /v1/chat/completions`` and ``/v1/completions``, whose ``model`` is a client's id, ``GET
    /v1/models`` and ``/health``. A chat's messages, a blank line between them, are the instruction
    of the run's own prompt; a completion's prompt is taken as it is. Without a temperature answers
    are greedy. Requests that wait together are decoded in one batch.

    Raises:
        InputError: no such run or checkpoint, its clients are of images or have trained heads, the
            port cannot be had, or FastAPI or uvicorn is missing.
    """
    config, saved = load_run(run_dir)
    if config.data.kind == "image":
        raise InputError(f"{run_dir}: its clients are of images; serve answers texts")
    try:
        import fastapi  # noqa: F401
    except ModuleNotFoundError:
        raise not_installed("fedalt serve", "fastapi", "serve") from None
    try:
        import uvicorn
    except ModuleNotFoundError:
        raise not_installed("fedalt serve", "uvicorn", "serve") from None
    ids = [*saved.record["clients"], *joined_clients(Path(run_dir))]
    model, tokenizer = load_clients(run_dir, ids)
    app = application(model, tokenizer, config.data)
    with _listening(host, port) as listener:
        address = "http://{}:{}".format(*listener.getsockname()[:2])
        print(f"{len(ids)} clients at {address}/v1; Ctrl-C ends it", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"--port: cannot listen at {host}:{port}: {first_line(error)}") from None


def application(model: ClientsModel, tokenizer: Any, data: DataConfig) -> Any:
    """The FastAPI application; it decodes while it is started.

    Args:
        model, tokenizer: from `load_clients`.
        data: of the run, for the prompt of a chat.
    """
    from fastapi import FastAPI
    from fastapi import Request as Call
    from fastapi.responses import JSONResponse, StreamingResponse

    decoder: list[Decoder] = []

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        decoder.append(Decoder(model, tokenizer))
        try:
            yield
        finally:
            await asyncio.to_thread(decoder.pop().close)

    app = FastAPI(title="fedalt serve", lifespan=life, openapi_url=None)

    def refuse(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
        return JSONResponse(protocol.error(message, kind), status)

    def tokens_of(asked: protocol.Asked) -> list[int]:
        if asked.chat:
            return list(encode([Record(asked.text, "")], tokenizer, data)[0].prompt)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return [*bos, *tokenizer(asked.text, add_special_tokens=False)["input_ids"]]

    async def answer(call: Call, chat: bool) -> Any:
        try:
            asked = protocol.read(json.loads(await call.body()), chat)
            if asked.client not in model.ids:
                known = ", ".join(model.ids)
                return refuse(404, f"model: no client {asked.client!r}; known: {known}")
            prompt = tokens_of(asked)
            check_prompt(prompt, asked.max_tokens, model.model)
        except InputError as error:
            return refuse(400, str(error))
        except ValueError as error:
            return refuse(400, f"the body is no JSON: {error}")
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        sampling = asked.temperature, asked.top_p
        request = Request(asked.client, prompt, emit, asked.max_tokens, asked.stop, *sampling)
        try:
            decoder[0].put(request)
        except Busy as error:
            return refuse(429, str(error), "rate_limit_error")
        reply = protocol.Reply(asked)
        if asked.stream:
            return StreamingResponse(events(request, pieces, reply), media_type="text/event-stream")
        text = ""
        while not (piece := await pieces.get()).end:
            text += piece.text
        if piece.end == "error":
            return refuse(503, piece.text, "server_error")
        return reply.whole(text + piece.text, piece.end, len(prompt), piece.tokens)

    @app.post("/v1/chat/completions")
    async def chat(call: Call) -> Any:
        return await answer(call, chat=True)

    @app.post("/v1/completions")
    async def completion(call: Call) -> Any:
        return await answer(call, chat=False)

    @app.get("/v1/models")
    async def models() -> Any:
        return protocol.models(model.ids)

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    return app


async def events(
    request: Request, pieces: "asyncio.Queue[Piece]", reply: protocol.Reply
) -> AsyncIterator[str]:
    """An answer as server-sent events; whoever stops listening ends it."""
    try:
        end = ""
        while not end:
            piece = await pieces.get()
            end = piece.end
            failed = end == "error"
            told = protocol.error(piece.text, "server_error") if failed else None
            yield f"data: {json.dumps(told or reply.chunk(piece.text, end))}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        request.gone = True

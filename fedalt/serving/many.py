"""Many clients of a run in one model: a batch's rows each take a client of their own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedalt.errors import InputError
from fedalt.model import HEAD, ClientRows, select, stack_clients
from fedalt.run import Stage
from fedalt.serving.clients import client_state
from fedalt.store import load_run


class ClientsModel(nn.Module):
    """A base with several clients in it, each row of a batch served by its own.

    Attributes:
        model: the Hugging Face model, with the clients in its adapted layers.
        ids: the clients.
    """

    def __init__(self, model: nn.Module, ids: Sequence[str], rows: ClientRows) -> None:
        super().__init__()
        self.model, self.ids = model, tuple(ids)
        self._rows = rows

    def forward(self, *args: Any, clients: Sequence[str], **kwargs: Any) -> Any:
        """What the model returns, where row i of the inputs is of ``clients[i]``.

        Raises:
            InputError: an unknown client, or not one a row.
        """
        with self._told(clients, args, kwargs):
            return self.model(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, clients: Sequence[str], **kwargs: Any) -> Any:
        """As the model's own ``generate``, beams and cache included; clients as in ``forward``.

        Raises:
            InputError: an unknown client, or not one a row.
        """
        with self._told(clients, args, kwargs):
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def _told(
        self, clients: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        known = {client: number for number, client in enumerate(self.ids)}
        if isinstance(clients, str):
            raise InputError(f"clients must be a list, one a row, got {clients!r}")
        for client in clients:
            if client not in known:
                raise InputError(f"clients: no client {client!r}; known: {', '.join(self.ids)}")
        inputs = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if inputs is not None and len(inputs) != len(clients):
            raise InputError(f"clients must be {len(inputs)}, one a row, got {len(clients)}")
        return self._rows.of([known[client] for client in clients])


def load_clients(run_dir: str | Path, ids: Sequence[str]) -> tuple[ClientsModel, Any]:
    """Several clients of a run's newest checkpoint in one model, and its tokenizer.

    Its ``generate`` and ``forward`` take ``clients=[...]``, one id a row, and give each row what
    `load_client` would give it. All share the base, which one pass serves; nothing is trainable.

    Args:
        run_dir: a finished or running run.
        ids: the clients, each once.

    Raises:
        InputError: no such run, checkpoint or client, a client twice, or clients with trained heads
            (``lora.modules_to_save``), which rows cannot share.
    """
    if isinstance(ids, str) or not ids:
        raise InputError(f"ids must be a list of clients, got {ids!r}")
    if twice := [client for i, client in enumerate(ids) if client in ids[:i]]:
        raise InputError(f"ids: {twice[0]!r} is there twice; name each client once")
    config, saved = load_run(run_dir)
    stage = Stage(config, (), saved.record["classes"])
    stage.go_on_from(saved)
    states = [client_state(Path(run_dir), saved, client) for client in ids]
    if any(select(state, HEAD) for state in states):
        raise InputError(
            f"{run_dir}: every client has its own {', '.join(config.lora.modules_to_save)}, which "
            "the rows of a batch cannot share; use fedalt.load_client"
        )
    rows = stack_clients(stage.model, states)
    return ClientsModel(stage.model, ids, rows).eval(), stage.task.tool

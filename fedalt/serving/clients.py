"""A finished run's clients, taken out of it: loaded to generate, or scored afresh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedalt.config import Config, DataConfig, PartitionConfig
from fedalt.data import Client, load_clients
from fedalt.errors import InputError
from fedalt.model import load_adapter_state, set_trainable
from fedalt.report import digits_of, number, table
from fedalt.run import Stage, joined_clients, score_clients, scoring_groups
from fedalt.store import Checkpoint, StoredState, load_run


def load_client(run_dir: str | Path, client_id: str) -> tuple[nn.Module, Any]:
    """A client's model from a run's newest checkpoint and its tokenizer (or image processor).

    It is ready to ``generate``; its adapters and mixer can be trained on.

    Raises:
        InputError: no such run, checkpoint or client, or a damaged checkpoint.
    """
    config, saved = load_run(run_dir)
    stage = Stage(config, (), saved.record["classes"])
    stage.go_on_from(saved)
    load_adapter_state(stage.model, client_state(Path(run_dir), saved, client_id))
    set_trainable(stage.model, stage.method.trains[0])
    return stage.model, stage.task.tool


def client_state(run_dir: Path, saved: Checkpoint, client_id: str) -> Mapping[str, Tensor]:
    """What a known or a joined client of a run uses; ``InputError`` names the known ones."""
    joined = joined_clients(run_dir)
    if client_id in saved.record["clients"]:
        return saved.used(client_id)
    if client_id in joined:
        return StoredState(joined[client_id])
    known = ", ".join([*saved.record["clients"], *joined])
    raise InputError(f"{run_dir}: no client {client_id!r}; known: {known}")


def records(config: Config, data: str = "") -> tuple[DataConfig, list[Client]]:
    """The records of a run's clients, or those in another folder, and where they are.

    Raises:
        InputError: none are there, or they cannot be read.
    """
    where, partition = config.data, config.partition
    if data:
        where, partition = (
            replace(where, path=data, clients=(), sources={}, columns={}),
            PartitionConfig(),
        )
    return where, load_clients(where, partition, config.seed)


def evaluate_run(run_dir: str | Path, client_id: str = "", data: str = "") -> str:
    """The table of a run's clients, scored afresh with the newest checkpoint.

    Args:
        run_dir: a finished or running run.
        client_id: only this client; empty: all.
        data: another folder with records of the same clients; empty: the run's own.

    Raises:
        InputError: no such run, checkpoint, client or data.
    """
    config, saved = load_run(run_dir)
    where, clients = records(config, data)
    there = [*saved.record["clients"], *joined_clients(Path(run_dir))]
    if client_id:
        clients = [client for client in clients if client.id == client_id]
        if not clients:
            raise InputError(f"{where.name}: no client {client_id!r} there")
    elif not data:  # those held out may not have joined yet
        clients = [client for client in clients if client.id in there]
    for client in clients:
        if client.id not in there:
            known = ", ".join(there)
            raise InputError(f"{where.name}: {run_dir}: no client {client.id!r}; known: {known}")
    whole = replace(config, federation=replace(config.federation, holdout=0.0))
    stage = Stage(whole, clients, saved.record["classes"])
    stage.go_on_from(saved)
    scored: dict[str, dict[str, float]] = {}
    for members in scoring_groups(stage):
        states = [client_state(Path(run_dir), saved, member.id) for member in members]
        for member, found in zip(members, score_clients(stage, members, states), strict=True):
            if isinstance(found, Exception):
                raise found
            scored[member.id] = found.scores
    stage.cuts.tell()
    names = list(dict.fromkeys(name for scores in scored.values() for name in scores))
    rows = [
        [client, *(number(scores.get(n), digits_of(n)) for n in names)]
        for client, scores in scored.items()
    ]
    return table(("client", *names), rows)

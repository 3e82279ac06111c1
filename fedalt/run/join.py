"""Clients that come after the training: they install what a newcomer gets and fit themselves in."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedalt.config import PartitionConfig
from fedalt.data import load_clients
from fedalt.errors import InputError
from fedalt.evaluation import Answers
from fedalt.methods import get_method, mean
from fedalt.model import (
    INDIVIDUAL,
    REST_OF_WORLD,
    State,
    adapter_alone,
    adapter_state,
    load_adapter_state,
    renamed,
    select,
)
from fedalt.report import read_results, unseen_table
from fedalt.run.cohort import derive_seed
from fedalt.run.scores import score
from fedalt.run.stage import NEWCOMER, Member, Stage
from fedalt.store import SERVER, Checkpoint, load_run, write_atomic, write_state, writing
from fedalt.training import train_client

JOINED = "joined"
NEAREST = 3
"""How many of the known clients' individual LoRAs ``join_start: nearest`` takes the mean of."""


def told(stage: Stage, member: Member, kept: Answers) -> dict[str, Any]:
    """What the journal keeps of a client's records and its answers to them."""
    return {"train": member.examples, **kept.event(stage.examples(member).test_records)}


def welcome(stage: Stage, saved: Checkpoint, member: Member) -> State:
    """A newcomer's first state: what the server gives it, and where its individual LoRA starts.

    With ``join_start: row`` both adapters are the mean of all clients' at first, so whatever the
    untrained mixer says, the newcomer begins as that mean; with the doubled gates of
    ``fedalt-relay``, as twice it.
    """
    given = saved.state(SERVER, NEWCOMER).read() if saved.has(SERVER, NEWCOMER) else {}
    state = stage.first_state(member.id) | given
    start, row = stage.config.federation.join_start, select(given, REST_OF_WORLD)
    if start == "nearest" and stage.method.rest_of_world:
        return state | _nearest(stage, saved, member, state)
    if start == "row":  # nothing where no Rest-of-World was made yet
        return state | renamed(row, REST_OF_WORLD, INDIVIDUAL)
    return state


@torch.no_grad()
def _nearest(stage: Stage, saved: Checkpoint, member: Member, state: State) -> State:
    """The mean of the individual LoRAs that, each alone, fit the newcomer's records best."""
    batch = stage.examples(member).train[: stage.config.evaluate.batch_size]
    losses = {}
    for client in saved.record["clients"]:
        candidate = select(saved.used(client), INDIVIDUAL)
        load_adapter_state(stage.model, state | candidate)
        with adapter_alone(stage.model, INDIVIDUAL):
            losses[client] = float(stage.task.loss(stage.model, batch))
    best = sorted(losses, key=lambda client: losses[client])[:NEAREST]
    chosen = [select(saved.used(client), INDIVIDUAL) for client in best]
    return mean(chosen, [1.0] * len(chosen))


def fit_in(stage: Stage, saved: Checkpoint, member: Member, run_dir: Path) -> None:
    """Welcome an unseen client, train what its method trains, score it, and keep what came out.

    ``RUN/joined/ID.safetensors`` is its state, ``ID.jsonl`` its scores: before, as of round 0, and
    after, as of the last epoch. Nothing reaches the known clients.
    """
    config, method = stage.config, stage.method
    epochs = config.federation.join_epochs
    events: list[dict[str, Any]] = [{"event": "join", "round": config.rounds, "client": member.id}]

    def note(epoch: int) -> None:
        row = {"round": epoch, "client": member.id, "unseen": True}
        kept = Answers(stage.config.evaluate.answers)
        events.append({"event": "evaluate"} | row | score(stage, member, kept=kept))
        events.append({"event": "answers"} | row | told(stage, member, kept))

    stage.load_base(saved)
    load_adapter_state(stage.model, welcome(stage, saved, member))
    note(0)
    train_client(
        stage.model,
        stage.examples(member).train,
        replace(
            config.train,
            epochs=epochs,
            max_steps=None,
            micro_batch=saved.record.get("micro_batch"),
        ),
        stage.task.loss,
        trains=method.trains,
        seed=derive_seed(config.seed, config.rounds + 1, member.id),
        count=stage.task.count,
    )
    note(epochs)
    folder = run_dir / JOINED
    with writing(folder):
        folder.mkdir(exist_ok=True)
    write_state(folder / f"{member.id}.safetensors", adapter_state(stage.model))
    lines = "".join(json.dumps(event) + "\n" for event in events)
    write_atomic(folder / f"{member.id}.jsonl", lines)


def join_run(run_dir: str | Path, data: str, epochs: int | None = None) -> str:
    """Fit unseen clients into a run, and the table of their scores before and after.

    Args:
        run_dir: a finished or running run; its newest checkpoint is what they join.
        data: a folder with one folder a client, or one client's folder.
        epochs: passes over their train records; None: ``federation.join_epochs``.

    Raises:
        InputError: no such run or data, a client is known there already, or the method still
            changes the base.
    """
    config, saved = load_run(run_dir)
    if get_method(config.method).changes_base and saved.round < config.rounds:
        raise InputError(
            f"{run_dir}: {config.method} changes the base until round {config.rounds}; join then"
        )
    if config.privacy.on:
        raise InputError(
            f"{run_dir}: privacy.record_clip, and who joins fits itself in without noise; train it "
            "in the federation"
        )
    path, alone = folder_of(data)
    where = replace(config.data, path=path, clients=alone, sources={}, columns={})
    if epochs is None:
        epochs = config.federation.join_epochs
    settings = replace(config.federation, holdout=0.0, join_epochs=epochs)
    config = replace(config, data=where, federation=settings)
    clients = load_clients(where, PartitionConfig(), config.seed)
    for client in clients:
        if client.id in saved.record["clients"]:
            raise InputError(f"{data}: {run_dir} knows the client {client.id!r}; rename the folder")
    stage = Stage(config, clients, saved.record["classes"])
    stage.check_training()
    stage.go_on_from(saved)
    for member in stage.known:
        fit_in(stage, saved, member, Path(run_dir))
    stage.cuts.tell()
    return unseen_table(read_results(Path(run_dir)))


def folder_of(data: str) -> tuple[str, tuple[str, ...]]:
    """A folder of clients, and of it the one client that is meant where ``data`` is its own."""
    folder = Path(os.path.abspath(data))
    if any((folder / name).exists() for name in ("train.jsonl", "train.jsonl.gz", "train")):
        return str(folder.parent), (folder.name,)
    return str(folder), ()


def joined_clients(run_dir: Path) -> dict[str, Path]:
    """By id, the files of clients that have joined a run."""
    paths = sorted((run_dir / JOINED).glob("[!.]*.safetensors"))  # a dot begins a cut-short save
    return {path.stem: path for path in paths}

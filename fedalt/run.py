"""One federated run, from config to report. Read ``Federation.run`` from top to bottom."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedalt import report, states, tables
from fedalt.checkpoint import CLIENTS, NEXT, Checkpoint, Draft, load_latest, write_atomic, writing
from fedalt.client import count_steps
from fedalt.config import Config, PartitionConfig
from fedalt.data import load_clients
from fedalt.errors import InputError
from fedalt.gates import GateMeter
from fedalt.join import fit_in, joined_clients, score
from fedalt.journal import Journal, Progress
from fedalt.methods import get_method
from fedalt.rounds import Play
from fedalt.rundir import (
    CONFIG,
    RESULTS,
    claim_run_dir,
    free_run_dir,
    load_run,
    refuse_changes,
    settings_of,
)
from fedalt.stage import Stage, set_stage


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        out: the run directory.
        results: as ``results.json``: last and best scores by client, and their means.
        table: one line a client, as text.
        page: the path of the report.
    """

    out: Path
    results: Mapping[str, Any]
    table: str
    page: Path


class Federation:
    """Clients that fine-tune one frozen base without sharing data, under one method."""

    def __init__(self, config: Config) -> None:
        """Raises ``InputError`` for a method that is not known; names the run directory."""
        get_method(config.method)
        self.config = replace(config, out=config.out or str(free_run_dir(config)))

    def run(self, resume: bool = False) -> Result:
        """Train, combine and evaluate round by round, saving after each.

        Args:
            resume: go on from the run directory's newest checkpoint, if it has one. The end has
                the same bits as that of a run that was never cut short.

        Raises:
            InputError: bad data, model, target or run directory. Nothing has been written then.
            RunFailed: no client could train.
        """
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        out = claim_run_dir(config, resume)
        stage = set_stage(config)
        saved = load_latest(out) if resume else None
        if saved:
            _refuse_changes(stage, saved, out)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / CONFIG, config.to_yaml())

        done = saved.round if saved else -1
        micro_batch = saved.record.get("micro_batch") if saved else config.train.micro_batch
        kept = saved.record["metrics_bytes"] if saved else 0
        with Journal(out, kept) as journal, _progress(stage, max(done, 0)) as progress:
            for number in range(done + 1, config.rounds + 1):
                draft = Draft(out, number)
                if saved is None:
                    sent = _begin(stage, draft)
                else:
                    play = Play(stage, number, saved, draft, journal, progress, micro_batch)
                    sent, micro_batch = play.run(), play.micro_batch
                if number % config.evaluate.every == 0 or number == config.rounds:
                    _evaluate(stage, draft, number, journal, progress)
                journal.sync()
                record = {
                    "clients": [member.id for member in stage.known],
                    "classes": stage.classes,
                    "fingerprints": stage.fingerprints,
                    "settings": settings_of(config),
                    "metrics_bytes": journal.size,
                    "sent": sent,
                    "micro_batch": micro_batch,
                }
                started = time.perf_counter()
                saved = draft.commit(record, keep=config.save_total_limit)
                journal.time(number, "save", "", time.perf_counter() - started)
                progress.end_round(number)
            assert saved is not None
            for member in stage.unseen:
                try:
                    fit_in(stage, saved, member, out)
                except RuntimeError:  # one client's fault must not cost the others' results
                    journal.error(traceback.format_exc())
                    progress.say(f"{member.id} could not join; see errors.log")

        results = report.read_results(out)
        write_atomic(out / RESULTS, json.dumps(results, indent=1) + "\n")
        with writing(out / "report"):
            table, page = report.write_report(out, f"{stage.method.name} on {config.data.name}")
        return Result(out, results, table, page)


def _progress(stage: Stage, done: int) -> Progress:
    config = stage.config
    steps = sum(count_steps(member.examples, config.train) for member in stage.known)
    return Progress(config.rounds, round(steps * config.federation.participation), done)


def _begin(stage: Stage, draft: Draft) -> dict[str, int]:
    """Round 0: every client's first state."""
    for member in stage.known:
        state = stage.first_state(member.id)
        draft.put(CLIENTS, member.id, state)
        if stage.method.keeps_local:
            draft.put(NEXT, member.id, state)
    return {}


def _evaluate(
    stage: Stage, draft: Draft, number: int, journal: Journal, progress: Progress
) -> None:
    """Score every client with what it uses; after the last round, with each adapter alone too."""
    apart = stage.method.rest_of_world and stage.config.evaluate.parts
    parts = (states.INDIVIDUAL, states.REST_OF_WORLD) if number == stage.config.rounds else ()
    stage.load_base(draft)
    for member in stage.known:
        started = time.perf_counter()
        states.load_adapter_state(stage.model, draft.state(CLIENTS, member.id).read())
        meter = GateMeter(stage.model)
        scores = score(stage, member, meter)
        journal.write("evaluate", number, member.id, **scores)
        if stage.method.rest_of_world:
            journal.write("gates", number, member.id, layers=meter.means())
        for part in parts if apart else ():
            with states.adapter_alone(stage.model, part):
                journal.write("part", number, member.id, part=part, **score(stage, member))
        journal.time(number, "evaluate", member.id, time.perf_counter() - started)
        progress.evaluated(member.id, scores)


def load_client(run_dir: str | Path, client_id: str) -> tuple[nn.Module, Any]:
    """A client's model from a run's newest checkpoint and its tokenizer (or image processor).

    It is ready to ``generate``; its adapters and mixer can be trained on.

    Raises:
        InputError: no such run, checkpoint or client, or a damaged checkpoint.
    """
    config, saved = load_run(run_dir)
    stage = Stage(config, (), saved.record["classes"])
    stage.go_on_from(saved)
    states.load_adapter_state(stage.model, client_state(Path(run_dir), saved, client_id))
    states.set_trainable(stage.model, stage.method.trains[0])
    return stage.model, stage.task.tool


def client_state(run_dir: Path, saved: Checkpoint, client_id: str) -> Mapping[str, Tensor]:
    """What a known or a joined client of a run uses; ``InputError`` names the known ones."""
    joined = joined_clients(run_dir)
    if client_id in saved.record["clients"]:
        return saved.used(client_id)
    if client_id in joined:
        return joined[client_id]
    known = ", ".join([*saved.record["clients"], *joined])
    raise InputError(f"{run_dir}: no client {client_id!r}; known: {known}")


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
    where, partition = config.data, config.partition
    if data:
        where, partition = (
            replace(where, path=data, clients=(), sources={}, columns={}),
            PartitionConfig(),
        )
    clients = load_clients(where, partition, config.seed)
    if client_id:
        clients = [client for client in clients if client.id == client_id]
        if not clients:
            raise InputError(f"{where.path}: no client {client_id!r} there")
    whole = replace(config, federation=replace(config.federation, holdout=0.0))
    stage = Stage(whole, clients, saved.record["classes"])
    stage.go_on_from(saved)
    scored: dict[str, dict[str, float]] = {}
    for member in stage.known:
        try:
            state = client_state(Path(run_dir), saved, member.id)
        except InputError as error:
            raise InputError(f"{where.path}: {error}") from None
        states.load_adapter_state(stage.model, state)
        scored[member.id] = score(stage, member)
    names = list(dict.fromkeys(name for scores in scored.values() for name in scores))
    rows = [
        [client, *(tables.number(scores.get(n), tables.digits_of(n)) for n in names)]
        for client, scores in scored.items()
    ]
    return tables.table(("client", *names), rows)


def _refuse_changes(stage: Stage, saved: Checkpoint, out: Path) -> None:
    refuse_changes(saved.record["settings"], settings_of(stage.config), saved.path)
    before, now = saved.record["fingerprints"], stage.fingerprints
    for name in now.keys() | before.keys():
        if before.get(name) != now.get(name):
            raise InputError(f"{out}: the {name} is not what it was when the run began; restore it")

"""One federated run, from config to report. Read ``Federation.run`` from top to bottom."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedalt import models, report
from fedalt.checkpoint import Checkpoint, load_latest, save_checkpoint, write_atomic
from fedalt.client import count_steps, derive_seed, train_client
from fedalt.config import Config
from fedalt.data import Client, load_clients
from fedalt.data.tokens import Example, encode
from fedalt.errors import InputError
from fedalt.evaluate import evaluate_client
from fedalt.journal import Journal, Progress
from fedalt.methods import Method, get_method
from fedalt.models import State
from fedalt.rundir import CONFIG, METRICS, RESULTS, claim_run_dir, free_run_dir, load_run


@dataclass
class Participant:
    """A client in the loop: its examples, where its next round starts, and what it now uses."""

    id: str
    train: list[Example]
    test: list[Example]
    references: list[str]
    next: Mapping[str, Tensor]
    used: Mapping[str, Tensor]


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        out: the run directory.
        results: as ``results.json``: last and best scores by client, and their means.
        table: one line a client, as text.
        plot: the path of the clients' curves.
    """

    out: Path
    results: Mapping[str, Any]
    table: str
    plot: Path


class Federation:
    """Clients that fine-tune one frozen base without sharing data, under one method."""

    def __init__(self, config: Config) -> None:
        """Raises ``InputError`` for a method that is not known; names the run directory."""
        self.method = get_method(config.method)
        self.config = replace(config, out=config.out or str(free_run_dir(config)))

    def run(self, resume: bool = False) -> Result:
        """Train, combine and evaluate round by round, saving after each.

        Args:
            resume: go on from the run directory's newest checkpoint, if it has one. The end has
                the same bits as that of a run that was never cut short.

        Raises:
            InputError: bad data, model, target or run directory. Nothing has been written then.
        """
        config, method = self.config, self.method
        if config.threads:
            torch.set_num_threads(config.threads)
        out = claim_run_dir(config, resume)
        clients = load_clients(config.data, config.seed)
        if method.sends and len(clients) < 2:
            raise InputError(f"{config.data.path}: {method.name} wants two clients or more, got 1")
        model, tokenizer = load_model(config)
        participants = _participants(clients, models.adapter_state(model), tokenizer, config)
        fingerprints = {
            "base": models.base_fingerprint(model),
            **{f"data of {client.id}": client.fingerprint() for client in clients},
        }
        saved = load_latest(out) if resume else None
        if saved:
            _restore(participants, saved, fingerprints, out)
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / CONFIG, config.to_yaml())

        steps = sum(count_steps(len(p.train), config.train) for p in participants)
        done = saved.round if saved else -1
        with (
            Journal(out / METRICS, keep=saved.record["metrics_bytes"] if saved else 0) as journal,
            Progress(config.rounds, steps, max(done, 0)) as progress,
        ):
            for number in range(done + 1, config.rounds + 1):
                if number > 0:
                    self._train(model, tokenizer, participants, number, journal, progress)
                if number % config.evaluate.every == 0 or number == config.rounds:
                    self._evaluate(model, tokenizer, participants, number, journal, progress)
                journal.sync()
                checkpoint = Checkpoint(
                    number,
                    used={p.id: p.used for p in participants},
                    next={p.id: p.next for p in participants},
                    record={"fingerprints": fingerprints, "metrics_bytes": journal.size},
                )
                save_checkpoint(out, checkpoint, keep=config.save_total_limit)
                progress.end_round(number)

        results = report.summarise(report.read_events(out / METRICS))
        write_atomic(out / RESULTS, json.dumps(results, indent=1) + "\n")
        table, plot = report.write_report(out, title=f"{method.name} on {config.data.path}")
        return Result(out, results, table, plot)

    def _train(
        self,
        model: nn.Module,
        tokenizer: Any,
        participants: Sequence[Participant],
        number: int,
        journal: Journal,
        progress: Progress,
    ) -> None:
        """Every client trains; what all handed in is combined; every client installs its part."""
        updates, losses = [], []
        for participant in participants:
            models.load_adapter_state(model, participant.next)
            trained = train_client(
                model,
                participant.train,
                self.config.train,
                seed=derive_seed(self.config.seed, number, participant.id),
                pad_id=tokenizer.pad_token_id,
                on_step=progress.step,
            )
            journal.write("train", number, participant.id, loss=trained.loss)
            losses.append(trained.loss)
            participant.used = participant.next = models.adapter_state(model)
            updates.append(models.individual_state(model))
        progress.trained(losses)
        if not self.method.sends:
            return
        inbound = self.method.combine(updates, [len(p.train) for p in participants])
        for participant, update in zip(participants, inbound, strict=True):
            row = models.as_rest_of_world(update) if self.method.rest_of_world else update
            participant.next = {**participant.next, **row}
            if not self.method.keeps_local:
                participant.used = participant.next

    def _evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,
        participants: Sequence[Participant],
        number: int,
        journal: Journal,
        progress: Progress,
    ) -> None:
        for p in participants:
            models.load_adapter_state(model, p.used)
            scores = evaluate_client(model, tokenizer, p.test, p.references, self.config.evaluate)
            journal.write("evaluate", number, p.id, **scores.to_dict())
            progress.evaluated(p.id, scores.rouge1)


def load_model(config: Config) -> tuple[nn.Module, Any]:
    """The base with fresh adapters as the config's method wants them, and its tokenizer."""
    method: Method = get_method(config.method)
    model, tokenizer = models.load_base(config.model)
    lora = config.lora
    models.inject(
        model,
        lora.rank,
        lora.alpha,
        lora.dropout,
        lora.target_modules,
        seed=config.seed,
        rest_of_world=method.rest_of_world,
        impl=lora.impl,
    )
    return model, tokenizer


def load_client(run_dir: str | Path, client_id: str) -> tuple[nn.Module, Any]:
    """A client's model from a run's newest checkpoint, ready to ``generate``, and its tokenizer.

    Raises:
        InputError: no such run, checkpoint or client, or a damaged checkpoint.
    """
    config, saved = load_run(run_dir)
    if client_id not in saved.used:
        known = ", ".join(saved.used)
        raise InputError(f"{run_dir}: no client {client_id!r}; known: {known}")
    model, tokenizer = load_model(config)
    models.load_adapter_state(model, saved.used[client_id])
    return model, tokenizer


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
    chosen = (client_id,) if client_id else config.data.clients
    where = replace(config.data, path=data or config.data.path, clients=chosen)
    clients = load_clients(where, config.seed)
    model, tokenizer = load_model(config)
    rows = []
    for p in _participants(clients, models.adapter_state(model), tokenizer, config):
        if p.id not in saved.used:
            raise InputError(f"{where.path}: {run_dir} has no client {p.id!r}; give its own data")
        models.load_adapter_state(model, saved.used[p.id])
        scores = evaluate_client(model, tokenizer, p.test, p.references, config.evaluate)
        rows.append([p.id, *scores.cells()])
    return report.table(("client", "ROUGE-1", "exact match", "loss"), rows)


def _participants(
    clients: Sequence[Client], start: State, tokenizer: Any, config: Config
) -> list[Participant]:
    """Every client with the same first state."""
    return [
        Participant(
            client.id,
            train=encode(client.train, tokenizer, config.data),
            test=encode(client.test, tokenizer, config.data),
            references=[record.output for record in client.test],
            next=start,
            used=start,
        )
        for client in clients
    ]


def _restore(
    participants: Sequence[Participant],
    saved: Checkpoint,
    fingerprints: Mapping[str, str],
    out: Path,
) -> None:
    before = saved.record["fingerprints"]
    for name in fingerprints.keys() | before.keys():
        if before.get(name) != fingerprints.get(name):
            raise InputError(f"{out}: the {name} is not what it was when the run began; restore it")
    for participant in participants:
        participant.used = saved.used[participant.id]
        participant.next = saved.next[participant.id]

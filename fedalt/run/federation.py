"""One federated run, from config to report. Read ``Federation.run`` from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedalt.config import Config
from fedalt.errors import RunFailed
from fedalt.methods import get_method
from fedalt.report import count
from fedalt.run.groups import Groups
from fedalt.run.join import fit_in
from fedalt.run.ledger import Ledger
from fedalt.run.reporter import Reporter
from fedalt.run.rounds import Play
from fedalt.run.scoring import begin, evaluate_clients, record_of, refuse_changed, write_end
from fedalt.run.stage import Stage, set_stage
from fedalt.store import (
    CONFIG,
    Draft,
    Journal,
    Progress,
    claim_run_dir,
    free_run_dir,
    load_latest,
    sole_writer,
    write_atomic,
    writing,
)
from fedalt.training import count_steps


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        out: the run directory.
        results: as ``results.json``: last and best scores by client, and their means.
        table: for a terminal, one line a client, and the verdict.
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
            RunFailed: no client could train, or none could be scored.
        """
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        out, began = claim_run_dir(config, resume), time.perf_counter()
        reporter = Reporter(config, out)
        stage = set_stage(config)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        with sole_writer(out):
            return self._run(stage, out, resume, began, reporter)

    def _run(
        self, stage: Stage, out: Path, resume: bool, began: float, reporter: Reporter
    ) -> Result:
        config = self.config
        saved = load_latest(out) if resume else None
        if saved:
            refuse_changed(stage, saved, out)
        write_atomic(out / CONFIG, config.to_yaml())

        done = saved.round if saved else -1
        micro_batch = saved.record.get("micro_batch") if saved else config.train.micro_batch
        kept = saved.record["metrics_bytes"] if saved else 0
        groups = Groups(stage, saved.record.get("together") if saved else None)
        ledger = Ledger(config, stage.known, saved.record.get("spent", {}) if saved else {})
        with (
            Journal(out, kept) as journal,
            _progress(stage, max(done, 0)) as progress,
            reporter.opened(progress.say) as tell,
        ):
            tell(done)
            if done < config.rounds:
                journal.start(done + 1, time.perf_counter() - began, _device(stage))
                progress.say(_opening(stage, out, done + 1))
            for number in range(done + 1, config.rounds + 1):
                if saved and ledger.closed():
                    break
                draft = Draft(out, number)
                if saved is None:
                    sent = begin(stage, draft)
                else:
                    play = Play(
                        stage, number, saved, draft, journal, progress, micro_batch, groups, ledger
                    )
                    sent, micro_batch = play.run(), play.micro_batch
                last = number == config.rounds or ledger.closed()
                if number % config.evaluate.every == 0 or last:
                    evaluate_clients(stage, draft, number, journal, progress, last)
                    stage.cuts.tell()
                journal.sync()
                record = record_of(stage, journal, sent, micro_batch, ledger)
                record["together"] = groups.most
                started = time.perf_counter()
                saved = draft.commit(record, keep=config.save_total_limit)
                journal.time(number, "save", "", time.perf_counter() - started)
                progress.end_round(number)
                tell(number)
            assert saved is not None
            for member in stage.unseen:
                try:
                    fit_in(stage, saved, member, out)
                except Exception as error:  # its fault must not cost the others' results
                    journal.fail(config.rounds, member.id, error, unseen=True)
                    progress.say(f"{member.id} could not join; see errors.log")
            stage.cuts.tell()

        results, table, page = write_end(out, f"{stage.method.name} on {config.data.name}")
        if not any(client["trained_rounds"] for client in results["clients"].values()):
            raise RunFailed(f"{out}: no update was good in any round; the report says why: {page}")
        return Result(out, results, table, page)


def _progress(stage: Stage, done: int) -> Progress:
    config = stage.config
    steps = sum(count_steps(member.examples, config.train) for member in stage.known)
    return Progress(config.rounds, round(steps * config.federation.participation), done)


def _opening(stage: Stage, out: Path, first: int) -> str:
    """What is about to be run: ``8 clients, 6 rounds of 30 steps, fedalt, on cpu -> DIR``."""
    config = stage.config
    steps = sorted({count_steps(member.examples, config.train) for member in stage.known})
    span = f"{steps[0]} to {steps[-1]}" if steps[1:] else str(steps[0])
    clients = count(len(stage.known), "client")
    clients += f" and {len(stage.unseen)} held out" if stage.unseen else ""
    rounds = f"{count(config.rounds, 'round')} of {span} {'step' if span == '1' else 'steps'}"
    rounds += f", from round {first} on" if first else ""
    return f"{clients}, {rounds}, {stage.method.name}, on {_device(stage)} -> {out}"


def _device(stage: Stage) -> str:
    """Where the model is, by name: ``cpu``, or a GPU's own."""
    device = next(stage.model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

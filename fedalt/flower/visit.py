"""A site's work on one message: take the last sum in, score what that makes, train, hand in.

A site's folder *is* a run directory with one client. Beside its checkpoints, ``turn/`` holds what
the client trained and has not installed upon yet, and ``handed/`` what it handed in, as long as a
sum may count it. All is made from the disk: a process may be killed anywhere, and the next one
gives the same message the same answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedalt.errors import InputError, first_line
from fedalt.flower.parcel import LAST, Parcel, on_grid
from fedalt.methods import Total, change_norm
from fedalt.model import State
from fedalt.report import read_events
from fedalt.run import (
    Ledger,
    Stage,
    begin,
    evaluate_clients,
    installed,
    record_of,
    refuse_changed,
    size_of,
    turn,
    write_end,
)
from fedalt.store import (
    CLIENTS,
    CONFIG,
    NEXT,
    OPTIMIZER,
    Checkpoint,
    Draft,
    Journal,
    Progress,
    StoredState,
    load_latest,
    write_atomic,
    write_state,
    writing,
)
from fedalt.training import UnusedLayers, count_steps

TURN = "turn"
"""Folder of the turn that is not installed upon yet; ``told.json`` in it is written last."""


def answered(out: Path, asked: Parcel) -> Parcel | None:
    """The answer that a site has given to the same message before, from its disk; or None."""
    told = _told(out)
    if told and told["asked"] == asked.digest():
        return _answer(out, told, asked)
    return None


class Visit:
    """What one message lets a client do."""

    def __init__(self, stage: Stage, asked: Parcel) -> None:
        self._stage, self._asked, self._out = stage, asked, Path(stage.config.out)
        (self._member,) = stage.known
        self._client = self._member.id
        self._handed = self._out / "handed"

    def answer(self, kind: str) -> Parcel:
        """Do what the message asks for.

        Raises:
            InputError: the disk is not the one of before, or the server's is not.
        """
        config, number = self._stage.config, int(self._asked.values["round"])
        saved = load_latest(self._out)
        if saved:
            refuse_changed(self._stage, saved, self._out)
        write_atomic(self._out / CONFIG, config.to_yaml())
        upto = number if kind == LAST else number - 1
        if saved and saved.round > upto:
            raise InputError(
                f"{self._out}: is past round {saved.round}, and the server asks for {number}; the "
                "server's folder is not the one of before, bring it back"
            )
        steps = count_steps(self._member.examples, config.train)
        kept = saved.record["metrics_bytes"] if saved else 0
        with Journal(self._out, kept) as journal, Progress(config.rounds, steps, upto) as progress:
            if saved is None:
                saved = self._begin(journal, progress)
            if saved.round < upto:
                saved = self._close(saved, upto, journal, progress, kind == LAST)
            self._stage.cuts.tell()
            if kind != LAST:
                return _answer(self._out, self._train(saved, number, journal), self._asked)
        write_end(self._out, f"{self._stage.method.name} on {config.data.name}, {self._client}")
        return Parcel({"client": self._client, "scores": scores_of(self._out)})

    def _begin(self, journal: Journal, progress: Progress) -> Checkpoint:
        draft = Draft(self._out, 0)
        sent = begin(self._stage, draft)
        micro_batch, ledger = self._stage.config.train.micro_batch, self._ledger({})
        return self._commit(draft, 0, sent, micro_batch, ledger, journal, progress, False)

    def _commit(
        self,
        draft: Draft,
        number: int,
        sent: Mapping[str, int],
        micro_batch: int | None,
        ledger: Ledger,
        journal: Journal,
        progress: Progress,
        last: bool,
    ) -> Checkpoint:
        config = self._stage.config
        if number % config.evaluate.every == 0 or last:
            evaluate_clients(self._stage, draft, number, journal, progress, last)
        journal.sync()
        record = record_of(self._stage, journal, sent, micro_batch, ledger)
        saved = draft.commit(record, keep=config.save_total_limit)
        progress.end_round(number)
        return saved

    def _ledger(self, spent: Mapping[str, int]) -> Ledger:
        return Ledger(self._stage.config, self._stage.known, spent)

    def _close(
        self, saved: Checkpoint, number: int, journal: Journal, progress: Progress, last: bool
    ) -> Checkpoint:
        """End the rounds up to ``number``: what was trained, and the newest sum taken in."""
        method, client, told = self._stage.method, self._client, _told(self._out)
        if told and told["round"] <= saved.round:  # installed upon already
            told = None
        outcome = self._asked.values["outcome"] or {}
        event = dict(told["event"]) if told else {}
        if told and outcome.get("round") == told["round"] and outcome["event"] == "refuse":
            event = {"event": "refuse", "reason": outcome["reason"]}
        trained = event.get("event") == "train"
        own: StoredState = _trained(self._out) if trained else saved.next(client)
        state, draft = own.read(), Draft(self._out, number)
        received = self._received(state, saved.round)
        before = own if trained else saved.used(client)
        used, after = installed(method, state, before, received)
        draft.put(CLIENTS, client, used)
        if after is not None:
            draft.put(NEXT, client, after)
        if method.keeps_optimizer:
            moments: Mapping[str, Tensor] = {}
            if trained:
                moments = StoredState(self._out / TURN / "optimizer.safetensors")
            elif saved.has(OPTIMIZER, client):
                moments = saved.state(OPTIMIZER, client)
            draft.put(OPTIMIZER, client, moments)
        if told and told.get("privacy"):
            journal.write("privacy", told["round"], client, **told["privacy"])
        if told:
            journal.write(event.pop("event"), told["round"], client, **event)
            if outcome.get("round") == told["round"] and outcome["event"] == "late":
                journal.write("late", told["round"], client)
        sent, micro_batch = dict(saved.record["sent"]), saved.record["micro_batch"]
        if told and trained:
            sent[client], micro_batch = told["round"], told["micro_batch"]
            sums = size_of(self._asked.states.get("sum", {}))
            journal.write("traffic", told["round"], client, sent=told["bytes"], received=sums)
        ledger = self._ledger((told or {}).get("spent", saved.record["spent"]))
        return self._commit(draft, number, sent, micro_batch, ledger, journal, progress, last)

    def _received(self, state: State, installed_upto: int) -> Mapping[str, Tensor]:
        """What the message's sum makes for this client; nothing where it has that already."""
        told, own_round = self._asked.values["total"], self._asked.values["own_round"]
        if not told or told["round"] <= installed_upto:
            return {}
        sums = self._asked.states["sum"]
        total = Total(sums, told["weight"], told["count"], {n: state[n].dtype for n in sums})
        own = None
        if own_round is not None:
            path = self._handed / f"round-{own_round:04d}.safetensors"
            own = StoredState(path)
        return self._stage.method.install(total, own, self._asked.values["own_weight"])

    def _train(self, saved: Checkpoint, number: int, journal: Journal) -> dict[str, Any]:
        """Train round ``number`` and keep what came of it, all of it before any of it is told."""
        stage, client, asked = self._stage, self._client, self._asked.values
        state = saved.next(client)
        moments: Mapping[str, Tensor] = {}
        if stage.method.keeps_optimizer and saved.has(OPTIMIZER, client):
            moments = saved.state(OPTIMIZER, client)
        told: dict[str, Any] = {"round": number, "client": client, "asked": self._asked.digest()}
        ledger = self._ledger(saved.record["spent"])
        if reason := ledger.refusal(client):
            return self._keep({**told, "event": {"event": "spent", "reason": reason}})
        try:
            micro_batch = saved.record["micro_batch"]
            done = turn(stage, self._member, number, state.read(), moments, micro_batch)
        except UnusedLayers as error:
            raise InputError(first_line(error)) from None
        except Exception as error:  # told like any other outcome; the others' round goes on
            reason = journal.fail(number, client, error)
            return self._keep({**told, "event": {"event": "fail", "reason": reason}})
        told["privacy"] = ledger.add(client, int(done.told["steps"]))
        told["spent"] = ledger.record()
        known = stage.sent_part(client, state)
        reason_not = done.fault(state, known)
        norm = 0.0 if reason_not else change_norm(done.update, known)
        usual, ratio = asked["usual_norm"], stage.config.federation.max_norm_ratio
        if not reason_not and usual and ratio and norm > ratio * usual:
            reason_not = f"its change has norm {norm:.3g}, more than {ratio:g} times the last "
            reason_not += f"round's median {usual:.3g}"
        if reason_not:
            return self._keep({**told, "event": {"event": "refuse", "reason": reason_not}})
        handed, told["clipped"] = dict(done.update), 0
        if asked["secure"]:
            handed, told["clipped"] = on_grid(done.update, asked["share"])
        folder = self._out / TURN
        with writing(folder):
            folder.mkdir(exist_ok=True)
            self._handed.mkdir(exist_ok=True)
        self._forget_handed()
        write_state(self._handed / f"round-{number:04d}.safetensors", handed)
        write_state(folder / "trained.safetensors", done.trained)
        if asked["start"]:
            write_state(folder / "start.safetensors", known)
        write_state(folder / "optimizer.safetensors", done.optimizer)
        more = {"norm": norm, "bytes": size_of(handed), "micro_batch": done.micro_batch}
        return self._keep({**told, **more, "event": {"event": "train", **done.told}})

    def _keep(self, told: dict[str, Any]) -> dict[str, Any]:
        folder = self._out / TURN
        with writing(folder):
            folder.mkdir(exist_ok=True)
        write_atomic(folder / "told.json", json.dumps(told) + "\n")
        return told

    def _forget_handed(self) -> None:
        """Remove what no sum will count any more: all before the last that the server took."""
        asked = self._asked.values
        oldest = min(
            r for r in (asked["accepted"], asked["own_round"], asked["round"]) if r is not None
        )
        for path in self._handed.glob("round-*.safetensors"):
            if int(path.stem.removeprefix("round-")) < oldest:
                with writing(path):
                    path.unlink()


def scores_of(out: Path) -> dict[str, Any]:
    """The newest scores of a site's client, with their ``round``; empty before any."""
    events = [row for row in read_events(out / "metrics.jsonl") if row["event"] == "evaluate"]
    if not events:
        return {}
    return {key: value for key, value in events[-1].items() if key not in ("event", "client")}


def _told(out: Path) -> dict[str, Any] | None:
    path = out / TURN / "told.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _trained(out: Path) -> StoredState:
    return StoredState(out / TURN / "trained.safetensors")


def _answer(out: Path, told: Mapping[str, Any], asked: Parcel) -> Parcel:
    """What leaves a site: its event without what only its disk needs, its scores, its update."""
    kept = ("round", "client", "event", "norm", "clipped", "privacy")
    values = {key: told[key] for key in kept if key in told} | {"scores": scores_of(out)}
    if told.get("privacy"):  # a mean loss of single records has no noise in it
        values["event"] = {k: v for k, v in told["event"].items() if k != "loss"}
    if told["event"]["event"] != "train":
        return Parcel(values)
    path = out / "handed" / f"round-{told['round']:04d}.safetensors"
    states = {"update": StoredState(path).read()}
    if asked.values["start"]:
        states["start"] = StoredState(out / TURN / "start.safetensors").read()
    return Parcel(values, states)

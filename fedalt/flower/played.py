"""One round at the server: messages out, answers looked at, one sum made of what counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedalt.config import Config
from fedalt.errors import RunFailed
from fedalt.flower.mail import Mail
from fedalt.flower.parcel import ROUND, Link, Parcel, of_form
from fedalt.methods import (
    Total,
    Update,
    change_norm,
    fault,
    get_method,
    out_of_proportion,
    total,
)
from fedalt.run import drawn, late, size_of
from fedalt.store import COUNTED, SERVER, Checkpoint, Draft, Journal

TOTAL, ALONE = "total", "alone"
"""The server's sum; and where two clients count, by id the other's update, which is the same."""
LEAST_SECURE = 3
"""Clients, of fewer than which a sum hides nobody."""


@dataclass
class Played:
    """One round at the server.

    Attributes:
        before: the checkpoint that it starts from; None: before the first round.
        updates: by client, what it handed in and may count; ``finished``: the norms of the changes.
    """

    link: Link
    mail: Mail
    config: Config
    number: int
    before: Checkpoint | None
    draft: Draft | None
    journal: Journal
    updates: dict[str, Update] = field(default_factory=dict)
    finished: dict[str, float] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    sums: Mapping[str, Tensor] | None = None
    spent: int = 0

    def __post_init__(self) -> None:
        self.method = get_method(self.config.method)
        record = self.before.record if self.before else {}
        self._sent: dict[str, int] = dict(record.get("sent", {}))
        self._scored: dict[str, int] = dict(record.get("scored", {}))
        self._total: dict[str, Any] | None = record.get("total")
        self._usual: float | None = record.get("usual_norm")

    def run(self) -> dict[str, Any]:
        """Play it; what the checkpoint says of it."""
        config, journal = self.config, self.journal
        cast = drawn(sorted(self.mail.roll.clients), self.number, config)
        orders = {client: self.order(client, ROUND) for client in cast}
        timeout, began = config.federation.round_timeout, time.perf_counter()
        if config.federation.secure:
            answers = self._secure(orders, timeout)
        else:
            answers = self.mail.gather(orders, ROUND, self.number, timeout)
        journal.time(self.number, "train", "", time.perf_counter() - began)
        reasons = [r for client in cast if (r := self._take(client, answers.get(client), timeout))]
        if len(reasons) == len(self.mail.roll.clients) > self.spent:
            raise RunFailed(
                f"round {self.number}: no site could train; {reasons[0]}; the same command goes on"
            )
        ratio = None if config.federation.secure else config.federation.max_norm_ratio
        norms = {client: self.finished[client] for client in self.updates}
        for client, reason in out_of_proportion(norms, ratio).items():
            self._refuse(client, reason)
            del self.finished[client], self.updates[client]
        for client in self.finished:
            journal.write("train", self.number, client, **self.told[client])
        missing = late(list(self.updates), self.number, config)
        for client in missing:
            self.outcomes[client] = {"round": self.number, "event": "late"}
            journal.write("late", self.number, client)
        self._take_late()
        self._combine(missing)
        taken = self.finished if config.federation.secure else self.updates
        self._sent |= dict.fromkeys(taken, self.number)
        changes = list(self.finished.values())
        return {
            "sent": self._sent,
            "scored": self._scored,
            "total": self._total,
            "outcomes": self.outcomes,
            "usual_norm": statistics.median(changes) if changes else self._usual,
        }

    def order(self, client: str, kind: str) -> Parcel:
        """What a client is asked, and the sum that it needs for it."""
        config, whole = self.config, self._total
        record = self.before.record if self.before else {}
        values: dict[str, Any] = {
            "kind": kind,
            "round": self.number,
            "total": None,
            "own_round": None,
            "own_weight": self._weight(client),
            "accepted": self._sent.get(client),
            "outcome": record.get("outcomes", {}).get(client),
            "secure": config.federation.secure,
            "share": self._weight(client) / self._most() if config.federation.secure else 1.0,
            "usual_norm": self._usual if config.federation.secure else None,
            "start": not config.federation.secure and client not in self._sent,
        }
        states: dict[str, Mapping[str, Tensor]] = {}
        if whole and self.before:
            values["total"] = {key: whole[key] for key in ("round", "weight", "count")}
            values["own_round"] = whole["own"].get(client)
            states["sum"] = self.before.state(SERVER, TOTAL).read()
            if self.before.has(ALONE, client):
                weight = whole["weight"] - self._weight(client)
                values["total"] |= {"weight": weight, "count": 1}
                values["own_round"] = None
                alone = {client: self.before.state(ALONE, client)}
                states["sum"] = dict(total(alone, {client: weight}).sums)
            if config.federation.secure:
                values["own_weight"] = 1.0
        return self.mail.addressed(values, states)

    def note_scores(self, client: str, answer: Parcel) -> None:
        """What a site tells of its client's scores, once a round."""
        scores = dict(answer.values.get("scores") or {})
        number = scores.pop("round", None)
        if scores and number is not None and self._scored.get(client, -1) < number:
            self.journal.write("evaluate", number, client, **scores)
            self._scored[client] = number

    def summary(self) -> str:
        losses = [told["loss"] for told in self.told.values() if "loss" in told]
        loss = f"  train loss {statistics.fmean(losses):.3f}" if losses else ""
        return f"{len(self.finished)} sites{loss}"

    def _take(self, client: str, answer: Parcel | str | None, timeout: float) -> str | None:
        """Take an answer in; or why it does not count."""
        if answer is None or isinstance(answer, str):
            reason = answer or f"no answer within {timeout:g} s"
            self.journal.write(
                "late" if answer is None else "fail", self.number, client, reason=reason
            )
            return f"{client}: {reason}"
        self.note_scores(client, answer)
        said = answer.values
        event = dict(said.get("event") or {"event": "fail", "reason": said.get("refused", "")})
        kind = event.pop("event")
        if said.get("privacy"):
            self.journal.write("privacy", self.number, client, **said["privacy"])
        self.spent += kind == "spent"
        if kind != "train":
            self.journal.write(kind, self.number, client, **event)
            return f"{client}: {event.get('reason')}"
        self.told[client] = event | ({"clipped": said["clipped"]} if said.get("clipped") else {})
        if self.config.federation.secure:
            self.finished[client] = float(said["norm"])
            return None
        update, known = answer.states.get("update", {}), of_form(self.mail.form_for(client))
        reason_not = fault(update, known)
        if reason_not is None and "start" in answer.states:
            reason_not = fault(answer.states["start"], known)
        if reason_not:
            self._refuse(client, reason_not)
            return f"{client}: {reason_not}"
        self.finished[client] = 0.0
        if update:
            start = answer.states.get("start") or self._started_from(client)
            self.finished[client] = change_norm(update, start)
            self.updates[client] = update
        return None

    def _refuse(self, client: str, reason: str) -> None:
        self.outcomes[client] = {"round": self.number, "event": "refuse", "reason": reason}
        self.journal.write("refuse", self.number, client, reason=reason)

    def _started_from(self, client: str) -> Update:
        """What a client's training began with, of what it hands in: as the server knows it."""
        assert self.before is not None
        last = self.before.state(COUNTED, client).read()
        whole = self._total
        if whole and whole["round"] >= self._sent[client]:
            asked = self.order(client, ROUND)
            own = last if asked.values["own_round"] is not None else None
            said, sums = asked.values["total"], asked.states["sum"]
            dtypes = {n: t.dtype for n, t in last.items()}
            made = self.method.install(
                Total(sums, said["weight"], said["count"], dtypes), own, asked.values["own_weight"]
            )
            last |= {name: made[name] for name in last.keys() & made.keys()}
        return last

    def _take_late(self) -> None:
        """Answers to messages of before: they count from the next round on, as absent ones'."""
        for client, (number, answer) in self.mail.overdue().items():
            update = answer.states.get("update", {})
            event = answer.values.get("event") or {}
            known = of_form(self.mail.form_for(client))
            if client in self.updates or event.get("event") != "train" or fault(update, known):
                continue
            if self.draft and number > self._sent.get(client, 0):
                self.draft.put(COUNTED, client, update)
                self._sent[client] = number
                self.journal.write("late", number, client, reason=f"came in round {self.number}")

    def _secure(self, orders: Mapping[str, Parcel], timeout: float) -> dict[str, Any]:
        """One secure sum over all that are there; who is not, is absent."""
        here = self.mail.here()
        nodes = {here[client]: order for client, order in orders.items() if client in here}
        if len(nodes) < LEAST_SECURE:
            return {}
        sums, told = self.link.secure_sum(nodes, self.mail.roll.form, timeout)
        self.sums = sums
        names = {node: client for client, node in here.items()}
        return {names[node]: answer for node, answer in told.items()}

    def _combine(self, missing: list[str]) -> None:
        """Sum what counts, and keep of every client what it handed in last."""
        assert self.draft is not None
        config, method = self.config, self.method
        for client in self.mail.roll.clients:
            if client in self.updates:
                self.draft.put(COUNTED, client, self.updates[client])
            elif (
                not self.draft.has(COUNTED, client)
                and self.before
                and self.before.has(COUNTED, client)
            ):
                self.draft.put(COUNTED, client, self.before.state(COUNTED, client))
        oldest = max(self.number - config.federation.max_age, 0)
        counted: dict[str, Update] = {}
        own: dict[str, int] = {}
        for client in sorted(self.mail.roll.clients):
            if client in self.updates and client not in missing:
                counted[client], own[client] = self.updates[client], self.number
            elif method.counts_absent and self.before:
                last = self.before.record["sent"].get(client, -1)
                if last >= oldest and self.before.has(COUNTED, client):
                    counted[client], own[client] = self.before.state(COUNTED, client), last
        if config.federation.secure:
            own = dict.fromkeys(self.finished, self.number)
        if len(own) < config.federation.min_clients or (config.federation.secure and not self.sums):
            reason = f"{len(own)} good updates, federation.min_clients is "
            reason += str(config.federation.min_clients)
            self.journal.write("thin", self.number, "", reason=reason)
            self._keep_total()
            return
        weights = {client: self._weight(client) for client in own}
        if config.federation.secure:
            assert self.sums is not None
            sums, weight = self.sums, sum(weights.values()) / self._most()
        else:
            whole = total(counted, weights)
            sums, weight = whole.sums, whole.weight
        self.draft.put(SERVER, TOTAL, sums)
        if len(counted) == 2:
            one, other = counted
            self.draft.put(ALONE, one, counted[other])
            self.draft.put(ALONE, other, counted[one])
        self._total = {"round": self.number, "weight": weight, "count": len(own), "own": own}
        for client in self.finished:
            sent = size_of(self.updates.get(client, sums))
            self.journal.write("traffic", self.number, client, sent=sent, received=size_of(sums))

    def _keep_total(self) -> None:
        """Where nothing is combined, the sum of before still stands for who has not had it."""
        assert self.draft is not None
        if not self.before or not self._total:
            return
        self.draft.put(SERVER, TOTAL, self.before.state(SERVER, TOTAL))
        for client in self._total["own"]:
            if self.before.has(ALONE, client):
                self.draft.put(ALONE, client, self.before.state(ALONE, client))

    def _weight(self, client: str) -> float:
        by_examples = self.method.by_examples
        return float(self.mail.roll.clients[client]["examples"]) if by_examples else 1.0

    def _most(self) -> float:
        return max(self._weight(client) for client in self.mail.roll.clients)

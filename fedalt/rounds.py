"""One round: the drawn clients train, good updates are combined, every client installs its part."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedalt import robust, states
from fedalt.checkpoint import CLIENTS, NEXT, OPTIMIZER, SERVER, Checkpoint, Draft, StoredState
from fedalt.client import train_client
from fedalt.cohort import derive_seed, drawn, late
from fedalt.errors import RunFailed
from fedalt.journal import Journal, Progress
from fedalt.method import Combined, Round
from fedalt.server import Update
from fedalt.stage import BASE, NEWCOMER, Member, Stage
from fedalt.states import State

TRAINED, UPDATE = "trained", "update"
"""Groups of the draft that live for one round."""


@dataclass
class Play:
    """A round and what it works with.

    Attributes:
        before: the checkpoint that the round starts from; ``draft``: the one that it writes.
        micro_batch: the examples that memory holds at once, so far as it is known; None: a batch.
        finished: by id, the clients whose training counts, with the norm of their change.
        updates: by id, what they handed in; a client that sends nothing is not in it.
    """

    stage: Stage
    number: int
    before: Checkpoint
    draft: Draft
    journal: Journal
    progress: Progress
    micro_batch: int | None
    finished: dict[str, float] = field(default_factory=dict)
    updates: dict[str, StoredState] = field(default_factory=dict)

    def run(self) -> dict[str, int]:
        """Play the round.

        Returns:
            By client id, the round of its last good update.

        Raises:
            RunFailed: not one of all clients could train. Where only some were drawn, others may in
                the next round.
        """
        members = {member.id: member for member in self.stage.known}
        self.stage.load_base(self.before)
        cast = drawn(list(members), self.number, self.stage.config)
        losses = [loss for id in cast if (loss := self._train(members[id])) is not None]
        if not losses and len(cast) == len(members):
            raise RunFailed(f"round {self.number}: no client could train; see errors.log")
        self.progress.trained(losses)
        started = time.perf_counter()
        self._refuse_the_unlike()
        missing = late(list(self.updates), self.number, self.stage.config)
        for client in missing:
            self.journal.write("late", self.number, client)
        combined = self._combine(self._counted(missing))
        self._install(combined)
        for group in (TRAINED, UPDATE):
            self.draft.drop(group)
        self.journal.time(self.number, "combine", "", time.perf_counter() - started)
        return {**self.before.record["sent"], **dict.fromkeys(self.updates, self.number)}

    def _train(self, member: Member) -> float | None:
        """Train one client and take its update in; None where it failed or was refused."""
        stage, client, started = self.stage, member.id, time.perf_counter()
        state = self.before.next(client)
        keeps = stage.method.keeps_optimizer
        moments: Mapping[str, Tensor] = {}
        if keeps and self.before.has(OPTIMIZER, client):
            moments = self.before.state(OPTIMIZER, client)
        try:
            states.load_adapter_state(stage.model, state.read())
            result = train_client(
                stage.model,
                stage.examples(member).train,
                replace(stage.config.train, micro_batch=self.micro_batch),
                stage.task.loss,
                trains=stage.trains(client),
                seed=derive_seed(stage.config.seed, self.number, client),
                count=stage.task.count,
                optimizer=moments if keeps else None,
                on_step=self.progress.step,
            )
            trained = states.adapter_state(stage.model)
            update = hand_in(trained, stage.sends(client), client)
        except Exception as error:  # one client's fault must not end the others' round
            self._failed(client, error)
            return None
        self.micro_batch = result.micro_batch
        known = stage.sent_part(client, state)
        reason = robust.fault(update, known) or robust.fault(trained, state)
        if reason:
            self.journal.write("refuse", self.number, client, reason=reason)
            return None
        self.draft.put(TRAINED, client, trained)
        if result.optimizer:
            self.draft.put(OPTIMIZER, client, result.optimizer)
        if update:
            self.updates[client] = self.draft.put(UPDATE, client, update)
        self.finished[client] = robust.change_norm(update, known)
        told = {"loss": result.loss, "steps": result.steps}
        if result.micro_batch and result.micro_batch < stage.config.train.batch_size:
            told["micro_batch"] = result.micro_batch
        self.journal.write("train", self.number, client, **told)
        self.journal.time(self.number, "train", client, time.perf_counter() - started)
        return result.loss

    def _failed(self, client: str, error: Exception) -> None:
        first = (str(error).strip().splitlines() or [""])[0]
        self.journal.write("fail", self.number, client, reason=f"{type(error).__name__}: {first}")
        self.journal.error("".join(traceback.format_exception(error)))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _refuse_the_unlike(self) -> None:
        norms = {client: self.finished[client] for client in self.updates}
        ratio = self.stage.config.federation.max_norm_ratio
        for client, reason in robust.out_of_proportion(norms, ratio).items():
            self.journal.write("refuse", self.number, client, reason=reason)
            del self.finished[client], self.updates[client]

    def _counted(self, missing: list[str]) -> dict[str, Update]:
        """By client id, what is combined: updates in time, and the absent clients' last ones."""
        method, settings = self.stage.method, self.stage.config.federation
        norms = [self.finished[client] for client in self.updates]
        middle = statistics.median(norms) if norms else 0.0
        sent = self.before.record["sent"]
        oldest = max(self.number - settings.max_age, 0)
        counted: dict[str, Update] = {}
        for member in self.stage.known:
            client = member.id
            last = self.stage.sent_part(client, self.before.next(client))
            if client in self.updates and client not in missing:
                counted[client] = self.updates[client]
                norm = self.finished[client]
                if settings.aggregate == "clipped" and norm > middle:
                    counted[client] = robust.Clipped(counted[client], last, middle / norm)
            elif method.counts_absent and sent.get(client, -1) >= oldest:
                counted[client] = last
        return counted

    def _combine(self, counted: Mapping[str, Update]) -> Combined | None:
        """What the method makes of the updates; None where nothing is sent or too few came."""
        stage, config = self.stage, self.stage.config
        if not stage.method.sends:
            return None
        if len(counted) < config.federation.min_clients:
            reason = f"{len(counted)} good updates, federation.min_clients is "
            reason += str(config.federation.min_clients)
            self.journal.write("thin", self.number, "", reason=reason)
            return None
        seed = derive_seed(config.seed, self.number, "fresh")
        base = self.before.state(SERVER, BASE) if self.before.has(SERVER, BASE) else {}
        return stage.method.combine(
            Round(
                self.number,
                counted,
                {member.id: member.examples for member in stage.known},
                stage.alpha,
                config.lora.rank,
                config.lora.client_ranks,
                config.federation.aggregate,
                config.federation.trim,
                dict(base),
                lambda client: states.select(stage.fresh(client, seed), states.INDIVIDUAL),
            )
        )

    def _install(self, combined: Combined | None) -> None:
        """Write every client's state after the round, and the server's."""
        method = self.stage.method
        for member in self.stage.known:
            client = member.id
            trained = client in self.finished
            own = self.draft.state(TRAINED, client) if trained else self.before.next(client)
            received = dict(combined.install(client)) if combined else {}
            installed = {**own.read(), **received}
            if method.keeps_local:
                self.draft.put(NEXT, client, installed)
                self.draft.put(
                    CLIENTS, client, (own if trained else self.before.used(client)).read()
                )
            else:
                self.draft.put(CLIENTS, client, installed)
            if method.keeps_optimizer and not trained:
                has = self.before.has(OPTIMIZER, client)
                before = self.before.state(OPTIMIZER, client) if has else {}
                self.draft.put(OPTIMIZER, client, before)
            if trained and method.sends:
                self.journal.write(
                    "traffic",
                    self.number,
                    client,
                    sent=_bytes(self.updates.get(client, {})),
                    received=_bytes(received) + (combined.extra_bytes if combined else 0),
                )
        if combined:
            self.draft.put(SERVER, NEWCOMER, dict(combined.install("")))
            if combined.base:
                self.draft.put(SERVER, BASE, combined.base)
        else:
            for name in (NEWCOMER, BASE):
                if self.before.has(SERVER, name):
                    self.draft.put(SERVER, name, self.before.state(SERVER, name))


def hand_in(state: State, parts: tuple[str, ...], client: str) -> State:
    """All that leaves a client: the parts of its state that its method sends."""
    return states.select(state, *parts)


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in dict(state).values())

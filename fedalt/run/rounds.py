"""One round: the drawn clients train, good updates are combined, every client installs its part."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedalt.errors import RunFailed, first_line
from fedalt.methods import Clipped, Combined, Round, Update, change_norm, out_of_proportion
from fedalt.model import INDIVIDUAL, HiddenRows, select
from fedalt.run.cohort import derive_seed, drawn, late
from fedalt.run.groups import Groups
from fedalt.run.ledger import Ledger
from fedalt.run.stage import BASE, NEWCOMER, Member, Stage
from fedalt.run.turns import Turn, installed, turn, turns_together
from fedalt.store import (
    CLIENTS,
    COUNTED,
    NEXT,
    OPTIMIZER,
    SERVER,
    Checkpoint,
    Draft,
    Journal,
    Progress,
    StoredState,
)
from fedalt.training import NotTogether, UnusedLayers, free_memory, out_of_memory

TRAINED, UPDATE = "trained", "update"
"""Groups of the draft that live for one round."""
ONE_BY_ONE = (
    "train.together: this model has layers that do not see a batch's rows in their order, or that "
    "no gradient reached; clients train one by one"
)


@dataclass
class Play:
    """A round and what it works with.

    Attributes:
        before: the checkpoint that the round starts from; ``draft``: the one that it writes.
        micro_batch: the examples that memory holds at once, so far as it is known; None: a batch.
        groups: who trains with whom.
        ledger: what each client's records have spent of their privacy.
        finished: by id, the clients whose training counts, with the norm of their change.
        told: by id, what their training said.
        updates: by id, what counts of what they handed in, by clients that send anything.
    """

    stage: Stage
    number: int
    before: Checkpoint
    draft: Draft
    journal: Journal
    progress: Progress
    micro_batch: int | None
    groups: Groups
    ledger: Ledger
    finished: dict[str, float] = field(default_factory=dict)
    told: dict[str, Mapping[str, float]] = field(default_factory=dict)
    updates: dict[str, Update] = field(default_factory=dict)

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
        groups = self.groups.of([members[id] for id in cast])
        reasons = [reason for group in groups for reason in self._train_group(group)]
        # Of the order of the groups no trace is left.
        self.finished = {id: self.finished[id] for id in cast if id in self.finished}
        self.updates = {id: self.updates[id] for id in cast if id in self.updates}
        if len(reasons) == len(members):
            raise RunFailed(f"round {self.number}: no client could train; {reasons[0]}")
        started = time.perf_counter()
        self._refuse_the_unlike()
        for client in self.finished:
            self.journal.write("train", self.number, client, **self.told[client])
        self.progress.trained([self.told[client]["loss"] for client in self.finished])
        if self.stage.config.federation.aggregate == "clipped":
            self._clip()
        missing = late(list(self.updates), self.number, self.stage.config)
        for client in missing:
            self.journal.write("late", self.number, client)
        combined = self._combine(self._counted(missing))
        self._install(combined)
        for group in (TRAINED, UPDATE):
            self.draft.drop(group)
        self.journal.time(self.number, "combine", "", time.perf_counter() - started)
        return {**self.before.record["sent"], **dict.fromkeys(self.updates, self.number)}

    def _train_group(self, members: Sequence[Member]) -> list[str]:
        """Train clients in one pass; of each that failed or was refused, why.

        Where they cannot all go together, or something fails, each half is trained anew.
        """
        if len(members) == 1:
            return [reason] if (reason := self._train(members[0])) else []
        started = time.perf_counter()
        states = [self.before.next(member.id) for member in members]
        half = (len(members) + 1) // 2
        try:
            turns = turns_together(
                self.stage,
                members,
                self.number,
                [state.read() for state in states],
                [self._moments(member.id) for member in members],
                self.progress.step,
            )
        except (NotTogether, HiddenRows):
            self.groups.most = half = 1
            self.progress.say(ONE_BY_ONE)
        except Exception as error:  # one client's fault, or that of their number
            self.progress.say(f"{len(members)} clients not trained together: {first_line(error)}")
            if out_of_memory(error):
                self.groups.most = half
        else:
            seconds = (time.perf_counter() - started) / len(members)
            taken = zip(members, states, turns, strict=True)
            return [reason for each in taken if (reason := self._take(*each, seconds))]
        # Out of the except clause the error is gone, and with it the frames that hold tensors.
        free_memory(self.stage.model)
        parts = [members[start : start + half] for start in range(0, len(members), half)]
        return [reason for part in parts for reason in self._train_group(part)]

    def _train(self, member: Member) -> str:
        """Train one client and take its update in; or why it failed or was refused."""
        stage, client, started = self.stage, member.id, time.perf_counter()
        if reason := self.ledger.refusal(client):
            self.journal.write("spent", self.number, client, reason=reason)
            return f"{client}: {reason}"
        state = self.before.next(client)
        try:
            done = turn(
                stage,
                member,
                self.number,
                state.read(),
                self._moments(client),
                self.micro_batch,
                self.progress.step,
            )
        except UnusedLayers:  # as it would be of every client
            raise
        except Exception as error:  # one client's fault must not end the others' round
            return f"{client}: {self.journal.fail(self.number, client, error)}; see errors.log"
        self.micro_batch = done.micro_batch
        if told := self.ledger.add(client, int(done.told["steps"])):
            self.journal.write("privacy", self.number, client, **told)
        return self._take(member, state, done, time.perf_counter() - started)

    def _moments(self, client: str) -> Mapping[str, Tensor]:
        if self.stage.method.keeps_optimizer and self.before.has(OPTIMIZER, client):
            return self.before.state(OPTIMIZER, client)
        return {}

    def _take(self, member: Member, state: StoredState, done: Turn, seconds: float) -> str:
        """Take in what a client has trained; or why it was refused."""
        client = member.id
        known = self.stage.sent_part(client, state)
        if reason := done.fault(state, known):
            self.journal.write("refuse", self.number, client, reason=reason)
            return f"{client}: {reason}"
        self.draft.put(TRAINED, client, done.trained)
        if done.optimizer:
            self.draft.put(OPTIMIZER, client, done.optimizer)
        if done.update:
            self.updates[client] = self.draft.put(UPDATE, client, done.update)
        self.finished[client] = change_norm(done.update, known)
        self.told[client] = done.told
        self.journal.time(self.number, "train", client, seconds)
        return ""

    def _refuse_the_unlike(self) -> None:
        norms = {client: self.finished[client] for client in self.updates}
        ratio = self.stage.config.federation.max_norm_ratio
        for client, reason in out_of_proportion(norms, ratio).items():
            self.journal.write("refuse", self.number, client, reason=reason)
            del self.finished[client], self.updates[client]

    def _clip(self) -> None:
        """Let no update move what counts of its client further than the median one does."""
        last = {client: self._last_counted(client) for client in self.updates}
        norms = {c: change_norm(update, last[c]) for c, update in self.updates.items()}
        middle = statistics.median(norms.values()) if norms else 0.0
        for client, norm in norms.items():
            if norm > middle:
                update = self.updates[client]
                self.updates[client] = Clipped(update, last[client], middle / norm)

    def _last_counted(self, client: str) -> StoredState:
        """What last counted of a client, which nearly always is what it has; still on disk."""
        if self.before.has(COUNTED, client):
            return self.before.state(COUNTED, client)
        return self.stage.sent_part(client, self.before.next(client))

    def _counted(self, missing: list[str]) -> dict[str, Update]:
        """By client id, what is combined: updates in time, and the absent clients' last ones."""
        method, sent = self.stage.method, self.before.record["sent"]
        oldest = max(self.number - self.stage.config.federation.max_age, 0)
        counted: dict[str, Update] = {}
        for member in self.stage.known:
            client = member.id
            if client in self.updates and client not in missing:
                counted[client] = self.updates[client]
            elif method.counts_absent and sent.get(client, -1) >= oldest:
                counted[client] = self._last_counted(client)
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
                lambda client: select(stage.fresh(client, seed), INDIVIDUAL),
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
            before = own if trained else self.before.used(client)
            used, after = installed(method, own.read(), before, received)
            self.draft.put(CLIENTS, client, used)
            if after is not None:
                self.draft.put(NEXT, client, after)
            if method.counts_absent:
                self._keep_counted(client, used)
            if method.keeps_optimizer and not trained:
                has = self.before.has(OPTIMIZER, client)
                moments = self.before.state(OPTIMIZER, client) if has else {}
                self.draft.put(OPTIMIZER, client, moments)
            if trained and method.sends:
                self.journal.write(
                    "traffic",
                    self.number,
                    client,
                    sent=size_of(self.updates.get(client, {})),
                    received=size_of(received) + (combined.extra_bytes if combined else 0),
                )
        if combined:
            self.draft.put(SERVER, NEWCOMER, dict(combined.install("")))
            if combined.base:
                self.draft.put(SERVER, BASE, combined.base)
        else:
            for name in (NEWCOMER, BASE):
                if self.before.has(SERVER, name):
                    self.draft.put(SERVER, name, self.before.state(SERVER, name))

    def _keep_counted(self, client: str, state: Mapping[str, Tensor]) -> None:
        """Store what counts of a client until its next update, if its own state is not that.

        It is not where the update was clipped, or where a mean was installed in its place.
        """
        if client in self.updates or client in self.before.record["sent"]:
            counts = self.updates.get(client, self._last_counted(client))
            if any(not torch.equal(state[name], tensor) for name, tensor in counts.items()):
                self.draft.put(COUNTED, client, counts)


def size_of(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in dict(state).values())

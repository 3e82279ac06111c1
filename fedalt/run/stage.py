"""Everything a run needs before its first round: clients looked through, model and task loaded."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedalt.config import CHAT, Config
from fedalt.data import Chat, Client, broken_images, load_clients
from fedalt.errors import InputError, InputWarning
from fedalt.evaluation import ImageTask, Task, TextTask
from fedalt.methods import Method, get_method
from fedalt.model import (
    HEAD,
    INDIVIDUAL,
    REST_OF_WORLD,
    BaseWeights,
    State,
    adapter_state,
    as_rest_of_world,
    base_fingerprint,
    fresh_state,
    inject,
    is_part,
    load_base,
    load_image_base,
    mixed_layers,
    part_of,
    select,
)
from fedalt.run.cohort import check_cohort, derive_seed, held_out
from fedalt.run.cuts import Cuts
from fedalt.store import SERVER, Checkpoint, StateFolder, StoredState, read_peft_adapter
from fedalt.training import check_optimizer, check_packing, check_privacy, check_recomputes

BASE, NEWCOMER = "base", "newcomer"
"""The server's own states: what is added to the base weights, and what a newcomer installs."""
MOST_NAMED = 3
"""Broken images that an error names; the rest is counted."""
SHELF = 8
"""Clients whose examples stay in memory; more are read and encoded again at every turn."""


@dataclass(frozen=True)
class Member:
    """What a run keeps of a client: its id, how to read it, and how many train records it has."""

    client: Client
    examples: int
    fingerprint: str

    @property
    def id(self) -> str:
        return self.client.id


@dataclass(frozen=True)
class Examples:
    """A client's examples, and the test records that answers are compared with."""

    train: Sequence[Any]
    test: Sequence[Any]
    test_records: Sequence[Any]


class Stage:
    """The model with its task, and the clients that play on it.

    Attributes:
        known: the members that train; ``unseen``: those held out.
        classes: of images, every label of the federation.
        fingerprints: by name, what must be the same when a run is resumed.
        cuts: what of the examples made so far was too long.
    """

    def __init__(
        self, config: Config, clients: Sequence[Client], classes: Sequence[str] = ()
    ) -> None:
        """Read every client through, then load the model.

        Args:
            config: of the run.
            clients: all of them.
            classes: of images, those that the model was trained on; empty: the clients' own.

        Raises:
            InputError: bad data, method, model or target. Nothing has been written.
        """
        self.config, self.method = config, get_method(config.method)
        labels, members, broken = set(classes), [], []
        self._chats = config.data.prompt == CHAT
        for client in clients:
            parts = client.read()
            members.append(Member(client, len(parts.train), parts.fingerprint()))
            records = [*parts.train, *parts.test]
            self._chats |= any(isinstance(record, Chat) for record in records)
            if config.data.kind == "image":
                broken += broken_images(records)
                labels |= set() if classes else {record.label for record in records}
        if broken:
            named = "; ".join(broken[:MOST_NAMED])
            rest = f"; and {len(broken) - MOST_NAMED} more" if broken[MOST_NAMED:] else ""
            raise InputError(named + rest)
        self.classes = sorted(labels)
        unseen = held_out([member.id for member in members], config)
        self.known = [member for member in members if member.id not in unseen]
        self.unseen = [member for member in members if member.id in unseen]
        self.model, self.task = load_model(config, self.classes)
        self.fingerprints = {"base": base_fingerprint(self.model)} | {
            f"data of {member.id}": member.fingerprint for member in members
        }
        self._base = BaseWeights(self.model) if self.method.changes_base else None
        self._fresh_head = select(adapter_state(self.model), HEAD)
        self._shelf: OrderedDict[str, Examples] = OrderedDict()
        self.cuts = Cuts(config.data.max_length)

    def go_on_from(self, saved: Checkpoint) -> None:
        """Take up a checkpoint's base; ``InputError`` where it was made on another one."""
        if self.fingerprints["base"] != saved.record["fingerprints"]["base"]:
            path = self.config.model.path
            raise InputError(
                f"{saved.path}: not made on the base {path}; restore the one it was on"
            )
        self.load_base(saved)

    def load_base(self, folder: StateFolder) -> None:
        """Give the base weights what the rounds up to a checkpoint have added to them."""
        if self._base is not None:
            has = folder.has(SERVER, BASE)
            self._base.add(folder.state(SERVER, BASE) if has else {})

    def examples(self, member: Member) -> Examples:
        """A client's encoded records, from the shelf or read anew."""
        if member.id not in self._shelf:
            parts = member.client.read()
            train = self.task.encode(parts.train)
            test = self.task.encode(parts.test, tested=True)
            self._shelf[member.id] = Examples(train, test, parts.test)
            both = [*train, *test]
            self.cuts.note(member.id, self.task.count_cut(both), len(both))
        self._shelf.move_to_end(member.id)
        while len(self._shelf) > SHELF:
            self._shelf.popitem(last=False)
        return self._shelf[member.id]

    def first_state(self, client: str) -> State:
        """What a client starts from: a shared draw, unless the method or the config says else."""
        config, method = self.config, self.method
        seed = config.seed if method.one_start else derive_seed(config.seed, 0, client)
        state = {**self.fresh(client, seed), **self._fresh_head}
        if client in config.lora.client_starts:
            state = self._with_adapter(state, client)
        if method.second_start != "zero":
            drawn = self.fresh(client, seed + 1) if method.second_start == "drawn" else state
            first = select(drawn, f"{INDIVIDUAL}.a")
            state |= as_rest_of_world({name: tensor.clone() for name, tensor in first.items()})
        return state

    def fresh(self, client: str, seed: int) -> State:
        """Adapters and mixers drawn from ``seed``, at the client's rank."""
        for _, layer in mixed_layers(self.model):
            if layer.rank != self.rank(client):
                layer.set_rank(self.rank(client))
        drawn = fresh_state(self.model, seed)
        return {name: t for name, t in drawn.items() if part_of(name) != HEAD}

    def _with_adapter(self, state: State, client: str) -> State:
        """``state`` with the PEFT adapter in it that the config names; spare rank starts fresh."""
        folder, rank = self.config.lora.client_starts[client], self.rank(client)
        adapter = read_peft_adapter(folder, state, self.alpha / rank)
        for name, tensor in adapter.items():
            axis = 0 if is_part(name, f"{INDIVIDUAL}.a") else 1
            if part_of(name) == HEAD:
                state[name] = tensor
            elif tensor.shape[axis] > rank:
                raise InputError(
                    f"{folder}: rank {tensor.shape[axis]}, the client's is {rank}; raise it"
                )
            else:
                state[name].narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
        return state

    @property
    def alpha(self) -> float:
        """Of every adapter; its scale is alpha / rank."""
        return self.config.lora.alpha * self.method.alpha_factor

    def rank(self, client: str) -> int:
        """The rank of a client's adapters."""
        return self.config.lora.client_ranks.get(client) or self.config.lora.rank

    def trains(self, client: str) -> list[tuple[str, ...]]:
        """The parts that a client trains; one of rank 0 trains no adapter."""
        groups = self.method.trains
        if self.config.lora.client_ranks.get(client) == 0:
            adapters = (INDIVIDUAL, REST_OF_WORLD)
            groups = tuple(
                tuple(part for part in group if part.partition(".")[0] not in adapters)
                for group in groups
            )
        return [group for group in groups if group]

    def sends(self, client: str) -> tuple[str, ...]:
        """The parts that a client hands in; one that trains no adapter hands in nothing."""
        return () if self.config.lora.client_ranks.get(client) == 0 else self.method.sends

    def sent_part(self, client: str, state: StoredState) -> StoredState:
        """Of a client's state, what it hands in; still on disk."""
        parts = self.sends(client)
        return state.only(lambda name: any(is_part(name, part) for part in parts))

    def check_training(self) -> None:
        """Refuses, with ``InputError``, training that this model or machine cannot do."""
        check_optimizer(self.config.train)
        for member in self.known:
            check_privacy(self.config.privacy, member.examples, member.id)
        if self.config.train.gradient_checkpointing:
            check_recomputes(self.model)
        if self.config.train.packing:
            check_packing(self.model)
        if self._chats:  # which the base's template may refuse
            for member in [*self.known, *self.unseen]:
                self.examples(member)
        elif getattr(self.task.tool, "chat_template", None):
            warnings.warn(
                f"data.prompt: {self.config.model.path} has a chat template and is trained without "
                f"it; -c data.prompt={CHAT} trains in it",
                InputWarning,
                stacklevel=2,
            )


def check_base(config: Config) -> None:
    """``InputError`` where the method adds to base weights that are to be quantized."""
    method, quantization = get_method(config.method), config.model.quantization
    if method.changes_base and quantization != "none":
        raise InputError(
            f"model.quantization: {method.name} adds to the base weights, which {quantization} "
            "cannot take; use none"
        )


def check(config: Config, clients: Sequence[str]) -> None:
    """Refuses settings that do not fit the clients or the method.

    Args:
        config: of the run.
        clients: the ids of all its clients, those that will be held out among them.

    Raises:
        InputError: a setting names a client that is not there, or does not go with the others.
    """
    method, lora, settings = get_method(config.method), config.lora, config.federation
    unseen = held_out(clients, config)
    check_base(config)
    for key, names in (
        ("lora.client_ranks", lora.client_ranks),
        ("lora.client_starts", lora.client_starts),
        ("federation.away", settings.away),
    ):
        for name in names:
            if name not in clients:
                raise InputError(f"{key}: no client {name!r}; known: {', '.join(clients)}")
            if name in unseen and key != "federation.away":
                raise InputError(
                    f"{key}.{name}: federation.holdout holds this client out, and who joins later "
                    "starts like any newcomer; take it out"
                )
    for name, rank in lora.client_ranks.items():
        if rank not in (0, lora.rank) and not method.mixes_ranks:
            raise InputError(
                f"lora.client_ranks.{name}: {method.name} wants one rank for all (or 0: "
                "trains no adapter); flexlora, flora and local take others"
            )
    if settings.aggregate in ("trimmed", "median") and not method.averages:
        raise InputError(
            f"federation.aggregate: {method.name} does more than average, which "
            f"{settings.aggregate!r} cannot make robust; use mean or clipped"
        )
    handled = {part for group in (*method.trains, method.sends) for part in group}
    if lora.client_starts and not handled & {INDIVIDUAL, f"{INDIVIDUAL}.a"}:
        raise InputError(
            f"lora.client_starts: {method.name} works on one A, the same for all; take them out "
            "or use a method that trains A, such as fedit or fedalt"
        )
    sends_individual = any(part.partition(".")[0] == INDIVIDUAL for part in method.sends)
    if settings.join_start == "nearest" and method.rest_of_world and not sends_individual:
        raise InputError(
            f"federation.join_start: 'nearest' copies individual adapters, which never leave a "
            f"client of {method.name}; use row or fresh"
        )
    check_cohort([client for client in clients if client not in unseen], config, method)


def set_stage(config: Config) -> Stage:
    """The stage of a run, from its config alone.

    Raises:
        InputError: bad data, method, model, target or client name. Nothing has been written.
    """
    clients = load_clients(config.data, config.partition, config.seed)
    check(config, [client.id for client in clients])
    stage = Stage(config, clients)
    stage.check_training()
    for client in config.lora.client_starts:
        stage.first_state(client)
    return stage


def load_model(config: Config, classes: Sequence[str]) -> tuple[nn.Module, Task]:
    """The base with fresh adapters as the config's method wants them, and its task."""
    lora, base = config.lora, config.model
    task: Task
    model: Any
    if config.data.kind == "image":
        model, processor = load_image_base(base, classes, lora.modules_to_save)
        task = ImageTask(config, processor, dict(model.config.label2id))
    else:
        model, tokenizer = load_base(base)
        task = TextTask(config, tokenizer)
    put_adapters(model, config)
    return model, task


def put_adapters(model: nn.Module, config: Config) -> None:
    """Fresh adapters as the config's method wants them, in place."""
    method: Method = get_method(config.method)
    lora = config.lora
    inject(
        model,
        lora.rank,
        lora.alpha * method.alpha_factor,
        lora.dropout,
        lora.target_modules,
        seed=config.seed,
        rest_of_world=method.rest_of_world,
        mixer=method.mixer,
        modules_to_save=lora.modules_to_save,
        impl=lora.impl,
    )

"""Scores of a run's clients, one by one or several in one pass over the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedalt.config import AUTO
from fedalt.evaluation import Answers, Examined
from fedalt.model import (
    GateMeter,
    HiddenRows,
    adapter_alone,
    clients_in,
    load_adapter_state,
)
from fedalt.run.stage import Member, Stage
from fedalt.training import free_memory, out_of_memory

Scores = dict[str, float]


@dataclass(frozen=True)
class Scored:
    """What scoring a client found.

    Attributes:
        scores: by name, with all of its adapters; ``alone``: by adapter, with no other.
        kept: its answers, where they were asked for.
        gates: by layer, the individual adapter's mean gate.
    """

    scores: Scores
    kept: Answers | None = None
    gates: Mapping[str, float] = field(default_factory=dict)
    alone: Mapping[str, Scores] = field(default_factory=dict)


def score(
    stage: Stage, member: Member, meter: GateMeter | None = None, kept: Answers | None = None
) -> Scores:
    """A client's scores on its test records, with the state that the model holds."""
    return stage.task.evaluate(stage.model, [_tested(stage, member, kept)], meter)[0]


def scoring_groups(stage: Stage) -> Iterator[list[Member]]:
    """The known clients, those together whom ``evaluate.together`` lets share batches."""
    settings, group, records = stage.config.evaluate, list[Member](), 0
    apart = stage.config.lora.modules_to_save or not stage.task.shares_batches
    for member in stage.known:
        group.append(member)
        if apart or settings.together == 1:
            full = True
        elif settings.together == AUTO:
            records += len(stage.examples(member).test)
            full = records >= settings.batch_size
        else:
            full = len(group) == settings.together
        if full:
            yield group
            group, records = [], 0
    if group:
        yield group


def score_clients(
    stage: Stage,
    members: Sequence[Member],
    states: Sequence[Mapping[str, Tensor]],
    parts: Sequence[str] = (),
    shown: int | None = None,
) -> Sequence[Scored | Exception]:
    """Score clients that go together, or one by one where memory or the model do not allow it.

    Args:
        states: what each of them uses.
        parts: the adapters that are scored alone as well.
        shown: answers to keep; None: none are.

    Returns:
        By client, its scores; the error where even alone memory did not suffice.
    """
    try:
        if len(members) == 1:
            return [_scored(stage, members[0], states[0], parts, shown)]
        return _scored_together(stage, members, states, parts, shown)
    except (HiddenRows, RuntimeError, MemoryError) as error:
        if len(members) == 1 and out_of_memory(error):
            return [error]
        if not (out_of_memory(error) or isinstance(error, HiddenRows)):
            raise
    free_memory(stage.model)
    return [
        each
        for member, state in zip(members, states, strict=True)
        for each in score_clients(stage, [member], [state], parts, shown)
    ]


def _scored(
    stage: Stage,
    member: Member,
    state: Mapping[str, Tensor],
    parts: Sequence[str],
    shown: int | None,
) -> Scored:
    load_adapter_state(stage.model, state)
    kept = None if shown is None else Answers(shown)
    meter = GateMeter(stage.model)
    scores, alone = score(stage, member, meter, kept), {}
    for part in parts:
        with adapter_alone(stage.model, part):
            alone[part] = score(stage, member)
    return Scored(scores, kept, meter.means(), alone)


def _scored_together(
    stage: Stage,
    members: Sequence[Member],
    states: Sequence[Mapping[str, Tensor]],
    parts: Sequence[str],
    shown: int | None,
) -> list[Scored]:
    model, task = stage.model, stage.task
    kept = [None if shown is None else Answers(shown) for _ in members]
    with clients_in(model, states) as (rows, layers):
        meter = GateMeter(model, layers)
        clients = [_tested(stage, *each) for each in zip(members, kept, strict=True)]
        scores = task.evaluate(model, clients, meter, rows)
    alone: list[dict[str, Scores]] = [{} for _ in members]
    for part in parts:
        with adapter_alone(model, part), clients_in(model, states) as (rows, _):
            clients = [_tested(stage, member, None) for member in members]
            for own, found in zip(alone, task.evaluate(model, clients, rows=rows), strict=True):
                own[part] = found
    gates = [meter.means(number) for number in range(len(members))]
    return [Scored(*each) for each in zip(scores, kept, gates, alone, strict=True)]


def _tested(stage: Stage, member: Member, kept: Answers | None) -> Examined:
    examples = stage.examples(member)
    return Examined(examples.test, examples.test_records, kept)

"""A round's training, or its scoring, one by one and together, in turns: what `together` brings.

    python scripts/time_together.py 8
    python scripts/time_together.py 8 --config digits -c threads=1 --times 5
    python scripts/time_together.py 8 --scoring -c train.max_steps=10

Prints seconds of both, the least and the median, by the clock and of the processor, and by how much
the two ends differ: losses, and the largest change of any number beside the largest of training; or
scores and losses, of clients that have trained a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch

from fedalt.config import load_config
from fedalt.model import State
from fedalt.run.groups import Groups
from fedalt.run.scores import Scores, score_clients, scoring_groups
from fedalt.run.stage import Member, Stage, set_stage
from fedalt.run.turns import Turn, turn, turns_together

Ends = dict[str, Turn]
Scored = dict[str, Scores]
Way = TypeVar("Way")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("together", type=int)
    parser.add_argument("--config")
    parser.add_argument("-c", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--scoring", action="store_true")
    wanted = parser.parse_args()
    config = load_config(wanted.config, tuple(wanted.c))
    if config.threads:
        torch.set_num_threads(config.threads)
    config = replace(
        config,
        train=replace(config.train, together=wanted.together),
        evaluate=replace(config.evaluate, together=wanted.together),
    )
    stage = set_stage(config)
    if wanted.scoring:
        states = {client: turn.trained for client, turn in one_by_one(stage).items()}
        scores = in_turns(
            lambda: scored(stage, states, [[member] for member in stage.known]),
            lambda: scored(stage, states, scoring_groups(stage)),
            wanted.times,
        )
        print(difference_of_scores(*scores))
    else:
        ends = in_turns(lambda: one_by_one(stage), lambda: together(stage), wanted.times)
        print(difference(stage, *ends))


def in_turns(alone: Callable[[], Way], beside: Callable[[], Way], times: int) -> tuple[Way, Way]:
    """Prints seconds of both ways; what each came to."""
    ways = {"one by one": alone, "together": beside}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    ends = {name: way() for name, way in ways.items()}  # libraries set themselves up
    for _ in range(times):
        for name, way in ways.items():
            clock, processor = time.perf_counter(), time.process_time()
            ends[name] = way()
            took[name].append((time.perf_counter() - clock, time.process_time() - processor))
    for name, seconds in took.items():
        by = [f"{min(s):.2f} / {statistics.median(s):.2f}" for s in zip(*seconds, strict=True)]
        print(f"{name:12} {by[0]} s, of the processor {by[1]} s")
    return ends["one by one"], ends["together"]


def scored(stage: Stage, states: Mapping[str, State], groups: Iterable[list[Member]]) -> Scored:
    found: Scored = {}
    for group in groups:
        given = score_clients(stage, group, [states[member.id] for member in group])
        for member, one in zip(group, given, strict=True):
            if isinstance(one, Exception):
                raise one
            found[member.id] = one.scores
    return found


def one_by_one(stage: Stage) -> Ends:
    return {m.id: turn(stage, m, 1, stage.first_state(m.id), {}, None) for m in stage.known}


def together(stage: Stage) -> Ends:
    ends: Ends = {}
    for group in Groups(stage).of(stage.known):
        states = [stage.first_state(member.id) for member in group]
        turns = turns_together(stage, group, 1, states, [{}] * len(group))
        ends |= {member.id: end for member, end in zip(group, turns, strict=True)}
    return ends


def difference_of_scores(alone: Scored, beside: Scored) -> str:
    apart = {
        name: max(abs(own[name] - beside[client][name]) for client, own in alone.items())
        for name in next(iter(alone.values()))
    }
    return "differ by at most " + ", ".join(f"{name} {most:.1e}" for name, most in apart.items())


def difference(stage: Stage, alone: Ends, beside: Ends) -> str:
    losses = max(abs(alone[c].told["loss"] / beside[c].told["loss"] - 1) for c in alone)
    apart = moved = 0.0
    for client, end in alone.items():
        first = stage.first_state(client)
        for name, tensor in end.trained.items():
            apart = max(apart, (tensor - beside[client].trained[name]).abs().max().item())
            moved = max(moved, (tensor - first[name]).abs().max().item())
    return (
        f"losses differ by {losses:.1e} of them, states by {apart:.1e}; training moved {moved:.1e}"
    )


if __name__ == "__main__":
    main()

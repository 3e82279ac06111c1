"""A round's training one by one and together, in turns: what `train.together` brings on a machine.

    python scripts/time_together.py 8
    python scripts/time_together.py 8 --config digits -c threads=1 --times 5

Prints seconds of both, the least and the median, by the clock and of the processor, and by how much
the two ends differ: losses, and the largest change of any number beside the largest of training.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fedalt.config import load_config
from fedalt.run.groups import Groups
from fedalt.run.stage import Stage, set_stage
from fedalt.run.turns import Turn, turn, turns_together

Ends = dict[str, Turn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("together", type=int)
    parser.add_argument("--config")
    parser.add_argument("-c", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--times", type=int, default=3)
    wanted = parser.parse_args()
    config = load_config(wanted.config, tuple(wanted.c))
    if config.threads:
        torch.set_num_threads(config.threads)
    stage = set_stage(replace(config, train=replace(config.train, together=wanted.together)))
    ways: dict[str, Callable[[Stage], Ends]] = {"one by one": one_by_one, "together": together}
    took: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    ends: dict[str, Ends] = {}
    for way in ways.values():  # libraries set themselves up, records are encoded
        way(stage)
    for _ in range(wanted.times):
        for name, way in ways.items():
            clock, processor = time.perf_counter(), time.process_time()
            ends[name] = way(stage)
            took[name].append((time.perf_counter() - clock, time.process_time() - processor))
    for name, seconds in took.items():
        by = [f"{min(s):.2f} / {statistics.median(s):.2f}" for s in zip(*seconds, strict=True)]
        print(f"{name:12} {by[0]} s, of the processor {by[1]} s")
    print(difference(stage, ends))


def one_by_one(stage: Stage) -> Ends:
    return {m.id: turn(stage, m, 1, stage.first_state(m.id), {}, None) for m in stage.known}


def together(stage: Stage) -> Ends:
    ends: Ends = {}
    for group in Groups(stage).of(stage.known):
        states = [stage.first_state(member.id) for member in group]
        turns = turns_together(stage, group, 1, states, [{}] * len(group))
        ends |= {member.id: end for member, end in zip(group, turns, strict=True)}
    return ends


def difference(stage: Stage, ends: dict[str, Ends]) -> str:
    alone, beside = ends["one by one"], ends["together"]
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

"""The cases that are modelled and measured: layers of known models, and the order they go in.

Two adapters, an individual one that is trained and a frozen Rest-of-World one, under a softmax
mixer; bfloat16 base, float32 adapters.  Up to `MOST_DECODE_ROWS` tokens a layer only generates, so
such cases have no backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

MOST_DECODE_ROWS = 64
ADAPTERS = 2
ROWS = (1, 4, 16, 64, 512, 2048, 8192)
RANKS = (8, 16, 64, 4)
DIRECTIONS = ("forward", "both", "backward")
FORWARD_SCHEDULES = ("decode", "recompute", "overlapped", "split", "expand")
BACKWARD_SCHEDULES = ("overlapped", "split", "expand")


class Layer(NamedTuple):
    """A linear layer: N outputs, K inputs."""

    model: str
    name: str
    n: int
    k: int


class Case(NamedTuple):
    """One layer at one size; directions are "forward", "backward", and "both", a training step."""

    layer: Layer
    m: int
    rank: int
    direction: str
    dropout: float = 0.0

    def __str__(self) -> str:
        layer = self.layer
        masked = f", dropout {self.dropout}" if self.dropout else ""
        return (
            f"{layer.model} {layer.name}, M {self.m}, N {layer.n}, K {layer.k}, r {self.rank}, "
            f"{self.direction}{masked}"
        )


LAYERS = (
    Layer("Llama-2-7B", "q", 4096, 4096),
    Layer("Llama-2-7B", "gate", 11008, 4096),
    Layer("Llama-2-7B", "down", 4096, 11008),
    Layer("Llama-3-8B", "k", 1024, 4096),
    Layer("Llama-3-8B", "gate", 14336, 4096),
    Layer("Llama-3-8B", "down", 4096, 14336),
    Layer("ViT-Base", "q", 768, 768),
    Layer("ViT-Base", "fc1", 3072, 768),
    Layer("ViT-Base", "fc2", 768, 3072),
)
Q, GATE, DOWN, NARROW, WIDE = LAYERS[0], LAYERS[1], LAYERS[2], LAYERS[3], LAYERS[4]


def schedules(case: Case) -> tuple[str, ...]:
    """The schedules that serve a case; of a training step those that have a backward."""
    if case.direction == "backward" and case.dropout:
        # The mask lies between strip and sum, which overlapping has no room for.
        return BACKWARD_SCHEDULES[1:]
    if case.direction != "forward":
        return BACKWARD_SCHEDULES
    served = list(FORWARD_SCHEDULES)
    if case.m > MOST_DECODE_ROWS or case.dropout:
        served.remove("decode")
    if case.dropout:
        served.remove("recompute")
    return tuple(served)


def goals() -> Iterator[Case]:
    """The cases that the project has set itself figures for, most telling first."""
    for rank in (8, 64, 16):
        for layer in (Q, NARROW, GATE, DOWN):
            yield Case(layer, 8192, rank, "forward")
            yield Case(layer, 8192, rank, "both")
        if rank == 8:
            for m in (1, 16, 4):
                yield Case(Q, m, rank, "forward")
                yield Case(WIDE, m, rank, "forward")
            yield Case(Q, 8192, rank, "both", 0.05)
    for m in (1, 16, 4):
        yield Case(Q, m, 16, "forward")
        yield Case(WIDE, m, 16, "forward")
    for rank in (8, 64, 16):
        for layer in (Q, NARROW, GATE, DOWN):
            yield Case(layer, 8192, rank, "backward")


def everything() -> Iterator[Case]:
    """Every case there is, in no special order."""
    for rank in RANKS:
        for layer in LAYERS:
            for m in ROWS:
                for direction in DIRECTIONS:
                    if direction == "forward" or m > MOST_DECODE_ROWS:
                        yield Case(layer, m, rank, direction)


def in_order() -> list[Case]:
    """Every case once, the goals first."""
    return list(dict.fromkeys([*goals(), *everything()]))

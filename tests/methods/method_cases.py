"""Three toy clients, sums over them in plain loops, and runs whose training is a known nudge.

Nothing here calls the project's own averages, products or selections: what a method must do is
written down a second time, slowly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fedalt
from fedalt.config.schema import Config
from fedalt.methods.fedalt import get_method
from fedalt.methods.method import Round
from fedalt.model import states
from fedalt.report.events import read_events
from fedalt.run import federation as run
from fedalt.run import turns as run_turns
from fedalt.run.cohort import derive_seed
from fedalt.store.checkpoint import Checkpoint, load_checkpoint
from fedalt.training.client import TrainResult

State = dict[str, Tensor]
A, B = "individual.a", "individual.b"
ROW_A, ROW_B, MIXER, HEAD = "rest_of_world.a", "rest_of_world.b", "mixer", "lm_head.weight"
EXAMPLES = {"ann": 10, "bob": 6, "cyd": 4}
"""Train records, as in ``tiny_data``."""
SCALE = 2.0
"""alpha / rank of the toys and of ``tiny_config``: 4 / 2."""


@dataclass(frozen=True)
class Counted:
    """What a server may count: by client what it trained, its examples, and its alpha / rank."""

    states: Mapping[str, Mapping[str, Tensor]]
    examples: Mapping[str, int] = field(default_factory=lambda: EXAMPLES)
    scales: Mapping[str, float] = field(default_factory=dict)

    def names(self, *parts: str) -> list[str]:
        """The tensors whose names end with one of ``parts``."""
        first = next(iter(self.states.values()))
        return [name for name in sorted(first) if name.endswith(parts)]

    def layers(self) -> list[str]:
        return [name.removesuffix(f".{A}") for name in self.names(A)]

    def mean(self, *parts: str, weights: Mapping[str, float] | None = None) -> State:
        """``Σ w c / Σ w`` of the tensors of ``parts``, rounded once; by examples by default."""
        weights = weights or {client: self.examples[client] for client in self.states}
        out = {}
        for name in self.names(*parts):
            total, whole = 0.0, 0.0
            for client, weight in weights.items():
                total = total + weight * self.states[client][name].numpy().astype(np.float64)
                whole += weight
            out[name] = torch.from_numpy((total / whole).astype(np.float32))
        return out

    def others(self, client: str, weights: Mapping[str, float] | None = None) -> dict[str, float]:
        """The weights, 1 by default, of all counted clients but one."""
        return {c: (weights or {}).get(c, 1.0) for c in self.states if c != client}

    def product(self, layer: str, weights: Mapping[str, float] | None = None) -> np.ndarray:
        """``Σ w s B A / Σ w``, fp64 [N, K]; by examples by default."""
        weights = weights or {client: self.examples[client] for client in self.states}
        total = 0.0
        for client, weight in weights.items():
            b, a = (self.states[client][f"{layer}.{part}"].numpy() for part in (B, A))
            scale = self.scales.get(client, SCALE)
            total = total + weight * scale * (b.astype(np.float64) @ a.astype(np.float64))
        return total / sum(weights.values())


def renamed(state: Mapping[str, Tensor]) -> State:
    """Individual tensors under the names of the Rest-of-World's."""
    return {name.replace("individual", "rest_of_world"): tensor for name, tensor in state.items()}


def integers(seed: int, *shape: int) -> Tensor:
    """Whole numbers from -4 to 4."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).float()


def toys(rank: int = 2, n: int = 4, k: int = 3) -> dict[str, State]:
    """Ann, Bob and Cyd: small whole numbers in every part of two layers and a head."""
    clients = {}
    for i, client in enumerate(EXAMPLES):
        state = {HEAD: integers(90 + i, 2, 3)}
        for j, layer in enumerate(("q", "v")):
            seed = 20 * i + 10 * j
            state |= {
                f"{layer}.{A}": integers(seed, rank, k),
                f"{layer}.{B}": integers(seed + 1, n, rank),
                f"{layer}.{ROW_A}": integers(seed + 2, rank, k),
                f"{layer}.{ROW_B}": integers(seed + 3, n, rank),
            }
        clients[client] = state
    return clients


def round_of(method: str, clients: Mapping[str, Mapping[str, Tensor]], **changes: object) -> Round:
    """A round in which every client handed in what the method sends."""
    sends = get_method(method).sends
    ends = tuple(f".{part}" if "." in part else f".{part}." for part in sends if part != "head")
    updates = {
        client: {
            name: tensor
            for name, tensor in state.items()
            if any(end in name for end in ends) or ("head" in sends and name == HEAD)
        }
        for client, state in clients.items()
    }
    usual = {"number": 1, "updates": updates, "examples": EXAMPLES, "alpha": 4.0, "rank": 2}
    return Round(**{**usual, **changes})


def assert_equal(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert sorted(got) == sorted(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def assert_product(
    got: Mapping[str, Tensor], a_name: str, b_name: str, scale: float, wanted: np.ndarray
) -> None:
    """Installed factors multiply to ``wanted``, but for the one rounding of each of them.

    ``|fl(B) fl(A) − B A| ≤ (2 u + u²) |B| |A|``, u = 2⁻²⁴; fp64 is off by 2⁻⁵³ of the largest value
    a few times the inner lengths, for which 2⁻⁴⁰ is more than enough.
    """
    b, a = (got[name].double().numpy() for name in (b_name, a_name))
    allowed = 2.0**-22 * scale * (abs(b) @ abs(a)) + 2.0**-40 * abs(wanted).max()
    assert (abs(scale * (b @ a) - wanted) <= allowed).all()


def truncated(product: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of a rank, by a dense SVD."""
    u, s, v = np.linalg.svd(product, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@dataclass
class Nudged:
    """A finished run whose clients' training was a nudge; by (round, client) what was seen.

    Attributes:
        before, trained: the model's state as the training found and left it.
        handed: what left the client; ``moments``: what was handed in of the optimizer's.
    """

    config: Config
    before: dict[tuple[int, str], State]
    trained: dict[tuple[int, str], State]
    handed: dict[tuple[int, str], State]
    moments: dict[tuple[int, str], Mapping[str, Tensor] | None]

    def saved(self, number: int) -> Checkpoint:
        return load_checkpoint(Path(self.config.out) / "checkpoints" / f"round-{number:04d}")

    def counted(self, number: int, *left_out: str) -> Counted:
        clients = {c: s for (n, c), s in self.trained.items() if n == number and c not in left_out}
        return Counted(dict(sorted(clients.items())))

    def traffic(self, number: int) -> dict[str, tuple[int, int]]:
        """By client, the bytes sent and received in a round."""
        events = read_events(Path(self.config.out) / "metrics.jsonl")
        return {
            e["client"]: (e["sent"], e["received"])
            for e in events
            if e["event"] == "traffic" and e["round"] == number
        }


def nudge(client: str, number: int, shape: torch.Size) -> Tensor:
    """What a client's training adds to a tensor: multiples of 1/64, other for every client."""
    length = shape.numel()
    stride = {"ann": 2, "bob": 3, "cyd": 5}[client]
    pattern = (torch.arange(length) * stride + number) % 7 - 3
    return pattern.reshape(shape) * EXAMPLES[client] / 64


def run_nudged(config: Config, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Nudged:
    """``fedalt.Federation`` with nudges for training, and constants for scores."""
    config = replace(config, save_total_limit=9, **changes)
    seen = Nudged(config, {}, {}, {}, {})
    turns = {
        derive_seed(config.seed, number, client): (number, client)
        for number in range(1, config.rounds + 1)
        for client in EXAMPLES
    }

    def train(model, examples, settings, loss, *, trains, seed, count, optimizer, privacy, on_step):
        number, client = which = turns[seed]
        assert len(examples) == EXAMPLES[client]
        seen.before[which], seen.moments[which] = states.adapter_state(model), optimizer
        for parts in trains:
            states.set_trainable(model, parts)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += nudge(client, number, parameter.shape)
        seen.trained[which] = states.adapter_state(model)
        kept = {} if optimizer is None else {"w.step": torch.tensor(float(number))}
        return TrainResult(1.0, 3, kept)

    hand_in = run_turns.hand_in

    def watch(state, parts, client):
        update = hand_in(state, parts, client)
        number = max(n for n, c in seen.trained if c == client)
        seen.handed[number, client] = update
        return update

    monkeypatch.setattr("fedalt.run.turns.train_client", train)
    monkeypatch.setattr("fedalt.run.turns.hand_in", watch)
    monkeypatch.setattr(run, "evaluate_clients", _score)
    fedalt.Federation(config).run()
    return seen


def _score(stage, draft, number, journal, progress, last):
    for member in stage.known:
        journal.write("evaluate", number, member.id, rouge1=1.0, loss=1.0)


def size(state: Mapping[str, Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())

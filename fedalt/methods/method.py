"""What a method is: a declaration, and one function from what was handed in to what is installed.

In every round a client loads its state, trains the parts that the method names, and hands in the
parts that it sends. ``combine`` turns all hand-ins into what each client installs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fedalt.methods import products, robust, server
from fedalt.methods.server import Total, Update
from fedalt.model import HEAD, INDIVIDUAL, MIXER, State, is_part

Install = Callable[[str], Mapping[str, Tensor]]
"""By client id, the tensors that take the place of the client's own."""


@dataclass(frozen=True)
class Round:
    """What the server has when it combines.

    Attributes:
        number: the round, from 1.
        updates: what counts, by client id in a fixed order; read from disk when asked for.
        examples: by client id, the number of its train records.
        alpha, rank: of every client's adapters, s = alpha / rank.
        ranks: by client id, where the rank is another.
        aggregate, trim: how averages are taken, as in ``FederationConfig``.
        base: what earlier rounds added to the base weights, float32 [N, K] by layer.
        fresh: new adapters for a client that begins again.
    """

    number: int
    updates: Mapping[str, Update]
    examples: Mapping[str, int]
    alpha: float
    rank: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    aggregate: str = "mean"
    trim: float = 0.1
    base: State = field(default_factory=dict)
    fresh: Callable[[str], State] = lambda client: {}

    def mean(self, *parts: str) -> State:
        """The average of all updates, or of some parts of them, weighted by examples.

        Robust averages count clients alike.
        """
        updates: list[Update] = list(self.updates.values())
        if parts:
            updates = [Parts(update, parts) for update in updates]
        if self.aggregate in ("trimmed", "median"):
            return self._robust(updates)
        return server.mean(updates, self.weights())

    def others(self, by_examples: bool = False) -> Install:
        """By client id, the average of all updates but its own."""
        if self.aggregate in ("trimmed", "median"):
            return lambda client: self._robust(
                [update for other, update in self.updates.items() if other != client]
            )
        weights = {c: float(self.examples[c]) for c in self.updates} if by_examples else None
        return server.leave_one_out(self.updates, weights)

    def mean_product(self, counted: Sequence[str], client: str, by_examples: bool = False) -> State:
        """Factors, at the client's rank and scale, of ``Σ p_k s_k B_k A_k`` over ``counted``.

        Rank that the product cannot fill starts afresh: rows of A drawn anew, columns of B zero.
        """
        updates = [self.updates[other] for other in counted]
        shares = [float(self.examples[other]) if by_examples else 1.0 for other in counted]
        weights = [
            share / sum(shares) * self.scaling_of(other) / self.scaling_of(client)
            for share, other in zip(shares, counted, strict=True)
        ]
        state: State = {}
        for layer in products.layers_of(updates[0]):
            b, a = products.factored(
                *products.stacked(updates, weights, layer), rank=self.rank_of(client)
            )
            dtype, filled = updates[0][f"{layer}.a"].dtype, sum(map(self.rank_of, counted))
            if filled < len(a):
                a[filled:] = self.fresh(client)[f"{layer}.a"][filled:]
            state |= {f"{layer}.a": a.to(dtype), f"{layer}.b": b.to(dtype)}
        return state

    def weights(self) -> list[float]:
        """The updates' numbers of examples, in their order."""
        return [float(self.examples[client]) for client in self.updates]

    def rank_of(self, client: str) -> int:
        return self.ranks.get(client) or self.rank

    def scaling_of(self, client: str) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank_of(client)

    def _robust(self, updates: Sequence[Update]) -> State:
        if self.aggregate == "median":
            return robust.median(updates)
        return robust.trimmed_mean(updates, self.trim)


class Parts(Mapping[str, Tensor]):
    """Those tensors of an update that belong to some parts, each read when asked for."""

    def __init__(self, update: Update, parts: tuple[str, ...]) -> None:
        self._update = update
        self._names = [name for name in update if any(is_part(name, part) for part in parts)]

    def __getitem__(self, name: str) -> Tensor:
        return self._update[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Combined:
    """What a round gives back.

    Attributes:
        install: by client id, what takes the place of its own tensors. An id that sent nothing,
            such as an unseen client's, gets what a newcomer would get.
        base: what is added to the base weights from now on, float32 [N, K] by layer.
        extra_bytes: what a client receives beside the tensors that ``install`` gives it.
    """

    install: Install
    base: State = field(default_factory=dict)
    extra_bytes: int = 0


class Method:
    """What is in the forward, what is trained and sent, and what a client then uses."""

    name: ClassVar[str]
    rest_of_world: ClassVar[bool] = False
    """The forward holds a second adapter; ``combine`` fills it."""
    mixer: ClassVar[bool | str | tuple[float, float]] = True
    """How two adapters are weighted, as in ``MixedLoRALinear``."""
    trains: ClassVar[tuple[tuple[str, ...], ...]] = ((INDIVIDUAL, MIXER, HEAD),)
    """The parts trained; several groups share the round's steps, one group after the other."""
    sends: ClassVar[tuple[str, ...]] = (INDIVIDUAL, HEAD)
    """The parts handed in. A method that sends nothing needs no other client."""
    keeps_local: ClassVar[bool] = False
    """A client is evaluated and used as it was before the last installation."""
    counts_absent: ClassVar[bool] = False
    """An absent client's last counted update still counts, up to ``federation.max_age`` rounds."""
    leaves_one_out: ClassVar[bool] = False
    """Its averages are of all counted clients but the one that installs them."""
    sum_is_enough: ClassVar[bool] = False
    """A client makes all that it installs of one sum, so that a server may broadcast that alone.

    A class with a ``combine`` or ``row`` of its own says so itself; it inherits no yes.
    """
    by_examples: ClassVar[bool] = True
    """Its averages are weighted by the clients' numbers of examples."""
    changes_base: ClassVar[bool] = False
    """``combine`` adds to the base weights."""
    averages: ClassVar[bool] = True
    """All that ``combine`` gives is an average, so that robust ones can take its place."""
    mixes_ranks: ClassVar[bool] = False
    """Clients may hold adapters of different ranks."""
    one_start: ClassVar[bool] = True
    """All clients start from the same A; otherwise each draws its own."""
    second_start: ClassVar[str] = "zero"
    """The second adapter's first A: ``zero``, the ``same`` as the individual's, or ``drawn``."""
    alpha_factor: ClassVar[float] = 1.0
    """What ``lora.alpha`` is multiplied by."""
    keeps_optimizer: ClassVar[bool] = False
    """AdamW's moments live on between a client's rounds."""

    def __init_subclass__(cls) -> None:
        if {"combine", "row"} & cls.__dict__.keys() and "sum_is_enough" not in cls.__dict__:
            cls.sum_is_enough = False

    def combine(self, round: Round) -> Combined:
        """What every client installs. Called with one update or more."""
        raise NotImplementedError

    def install(self, total: Total, own: Update | None, weight: float) -> State:
        """What one client installs, from the sum alone; the same bits as by ``combine``.

        Args:
            total: of all that counts, weighted by examples if ``by_examples``.
            own: exactly what it counts of this client; None: nothing.
            weight: of ``own``.
        """
        return server.row_of(total, own if self.leaves_one_out else None, weight)

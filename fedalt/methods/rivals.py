"""The methods that FedALT is compared with."""

from __future__ import annotations

import torch

from fedalt.methods import products
from fedalt.methods.method import Combined, Method, Round
from fedalt.model import HEAD, INDIVIDUAL, REST_OF_WORLD, State


class Local(Method):
    """Every client alone: nothing is sent."""

    name = "local"
    sends = ()
    mixes_ranks = True


class FedIT(Method):
    """FedAvg of one LoRA, A and B apart, weighted by examples (Zhang et al. 2024)."""

    name = "fedit"
    sum_is_enough = True

    def combine(self, round: Round) -> Combined:
        mean = round.mean()
        return Combined(lambda client: mean)


class FedITFineTuned(FedIT):
    """FedIT; each client then uses its own last local state, the mean trained once more."""

    name = "fedit+ft"
    keeps_local = True


class FFALoRA(FedIT):
    """One random A, shared and frozen; B trained and averaged, which is exact (Sun et al. 2024)."""

    name = "ffa-lora"
    trains = ((f"{INDIVIDUAL}.b", HEAD),)
    sends = (f"{INDIVIDUAL}.b", HEAD)


class FedSALoRA(FedIT):
    """A averaged; B stays with its client (Guo et al. 2025)."""

    name = "fedsa-lora"
    sends = (f"{INDIVIDUAL}.a",)


class FedExLoRA(FedIT):
    """FedIT, made exact: what the mean of products has beyond the product of means goes into W.

    ``W += Σ p_k s B_k A_k − s B̄ Ā`` (Singhal et al. 2025).
    """

    name = "fedex-lora"
    changes_base = True
    averages = False

    def combine(self, round: Round) -> Combined:
        mean = round.mean()
        base, extra = _add_products(round, minus=mean)
        return Combined(lambda client: mean, base, extra)


class FLoRA(Method):
    """All clients' adapters stacked into W, ``W += Σ p_k s_k B_k A_k``; new ones begin.

    Of Wang et al. (2024), whose clients may hold different ranks.
    """

    name = "flora"
    changes_base = True
    averages = False
    mixes_ranks = True

    def combine(self, round: Round) -> Combined:
        base, extra = _add_products(round, minus=None)
        head = round.mean(HEAD)
        return Combined(lambda client: {**round.fresh(client), **head}, base, extra)


class FlexLoRA(Method):
    """The mean product, cut back by SVD to every client's own rank (Bai et al. 2024)."""

    name = "flexlora"
    averages = False
    mixes_ranks = True

    def combine(self, round: Round) -> Combined:
        head, counted = round.mean(HEAD), list(round.updates)
        products: dict[int, State] = {}  # by rank: clients of one rank get the same

        def install(client: str) -> State:
            rank = round.rank_of(client)
            if rank not in products:
                products[rank] = round.mean_product(counted, client, by_examples=True)
            return {**products[rank], **head}

        return Combined(install)


class FedDPA(Method):
    """A local and a global LoRA, each with weight one half (Yang et al. 2024, their variant T).

    A round trains the local one for the first half of its steps, then the global one, which alone
    is sent and averaged.
    """

    name = "feddpa"
    sum_is_enough = True
    rest_of_world = True
    mixer = (0.5, 0.5)
    trains = ((INDIVIDUAL, HEAD), (REST_OF_WORLD, HEAD))
    sends = (REST_OF_WORLD,)
    second_start = "drawn"

    def combine(self, round: Round) -> Combined:
        mean = round.mean()
        return Combined(lambda client: mean)


def _add_products(round: Round, minus: State | None) -> tuple[State, int]:
    """The base's change with this round's products in it, and the bytes that tell a client of it.

    A change of rank R is sent as factors of R (N + K) numbers, or whole where that is less.
    """
    updates, shares = list(round.updates.values()), round.weights()
    weights = [
        share / sum(shares) * round.scaling_of(client)
        for share, client in zip(shares, round.updates, strict=True)
    ]
    base, numbers = {}, 0
    for layer in products.layers_of(updates[0]):
        b, a = products.stacked(updates, weights, layer)
        if minus is not None:
            b = torch.cat([b, -round.scaling_of("") * minus[f"{layer}.b"].double()], dim=1)
            a = torch.cat([a, minus[f"{layer}.a"].double()])
        name = layer.removesuffix(f".{INDIVIDUAL}")
        change = (b @ a).float()
        base[name] = round.base[name] + change if name in round.base else change
        numbers += min(b.numel() + a.numel(), change.numel())
    return base, 4 * numbers


RIVALS: tuple[Method, ...] = (
    Local(),
    FedIT(),
    FedITFineTuned(),
    FFALoRA(),
    FedSALoRA(),
    FedExLoRA(),
    FLoRA(),
    FlexLoRA(),
    FedDPA(),
)

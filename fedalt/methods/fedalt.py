"""FedALT, its ablations and variants, and the register of all methods."""

from __future__ import annotations

from fedalt.errors import InputError
from fedalt.methods import products, server
from fedalt.methods.method import Combined, Install, Method, Round
from fedalt.methods.rivals import RIVALS
from fedalt.methods.server import Total, Update
from fedalt.model import HEAD, INDIVIDUAL, MIXER, REST_OF_WORLD, State, as_rest_of_world


class FedALT(Method):
    """Individual LoRA and mixer trained; Rest-of-World, the others' mean, frozen beside them."""

    name = "fedalt"
    rest_of_world = True
    sends = (INDIVIDUAL,)
    counts_absent = True
    leaves_one_out = True
    sum_is_enough = True
    by_examples = False

    def combine(self, round: Round) -> Combined:
        row = self.row(round)
        return Combined(lambda client: as_rest_of_world(row(client)))

    def row(self, round: Round) -> Install:
        """By client id, its Rest-of-World, under the names of what was sent."""
        return round.others()

    def install(self, total: Total, own: Update | None, weight: float) -> State:
        return as_rest_of_world(super().install(total, own, weight))


class Half(FedALT):
    """FedALT whose mixer is fixed at one half."""

    name = "fedalt-half"
    mixer = (0.5, 0.5)


class Scalar(FedALT):
    """FedALT with one gate a layer, whatever the token."""

    name = "fedalt-scalar"
    mixer = "scalar"


class SelfIncluded(FedALT):
    """FedALT whose Rest-of-World is the mean of all, the client among them."""

    name = "fedalt-self"
    sum_is_enough = True
    leaves_one_out = False

    def row(self, round: Round) -> Install:
        everyone = round.others()("")
        return lambda client: everyone


class TrainedRow(FedALT):
    """FedALT whose Rest-of-World is trained along, until the next one replaces it."""

    name = "fedalt-trained-row"
    trains = ((INDIVIDUAL, REST_OF_WORLD, MIXER, HEAD),)


class Weighted(FedALT):
    """FedALT whose Rest-of-World is weighted by the others' numbers of examples."""

    name = "fedalt-weighted"
    sum_is_enough = True
    by_examples = True

    def row(self, round: Round) -> Install:
        return round.others(by_examples=True)


class ExactRow(FedALT):
    """FedALT whose Rest-of-World is the others' mean product, cut back to the rank by SVD."""

    name = "fedalt-svd"
    averages = False

    def row(self, round: Round) -> Install:
        def of_others(client: str) -> State:
            others = [other for other in round.updates if other != client]
            return round.mean_product(others, client)

        return of_others


class Similar(FedALT):
    """FedALT whose Rest-of-World favours clients of like B: weights softmax(cosine / 0.1)."""

    name = "fedalt-similar"
    averages = False

    def row(self, round: Round) -> Install:
        cosines = products.similarity(list(round.updates.values()))
        ids = list(round.updates)

        def of_like(client: str) -> Update:
            if client not in round.updates:
                return round.others()(client)
            others = [other for other in ids if other != client]
            shares = cosines[ids.index(client), [ids.index(other) for other in others]] / 0.1
            return server.mean([round.updates[o] for o in others], shares.softmax(0).tolist())

        return of_like


class OwnStart(FedALT):
    """FedALT whose clients each draw their own first A."""

    name = "fedalt-own-start"
    one_start = False


class KeptOptimizer(FedALT):
    """FedALT whose clients keep AdamW's moments from round to round."""

    name = "fedalt-kept-optimizer"
    keeps_optimizer = True


class OneA(FedALT):
    """FedALT on one random A, shared and frozen: the mean of the products is then exact."""

    name = "fedalt-one-a"
    trains = ((f"{INDIVIDUAL}.b", MIXER, HEAD),)
    sends = (f"{INDIVIDUAL}.b",)
    second_start = "same"


class Warm(FedALT):
    """FedALT whose individual LoRAs start from two rounds of FedAvg."""

    name = "fedalt-warm"
    warm_rounds = 2

    def combine(self, round: Round) -> Combined:
        if round.number > self.warm_rounds:
            return super().combine(round)
        mean = round.mean()
        return Combined(lambda client: mean)


class Relay(FedALT):
    """FedALT whose Rest-of-World is trained on and passed on, like a baton.

    A client trains its individual LoRA, the mixer and its copy of the Rest-of-World together, hands
    in that copy, and installs the mean of the others' copies; what it learned for itself stays in
    the individual LoRA, which never leaves. The gates, which add up to one, are doubled, so that
    neither adapter is held back at first. A client uses its last local state, as in ``fedit+ft``.
    """

    name = "fedalt-relay"
    trains = ((INDIVIDUAL, REST_OF_WORLD, MIXER, HEAD),)
    sends = (REST_OF_WORLD,)
    counts_absent = False
    keeps_local = True
    second_start = "drawn"
    alpha_factor = 2.0


class RelayKept(Relay):
    """The relay whose clients keep AdamW's moments from round to round."""

    name = "fedalt-relay-kept"
    keeps_optimizer = True


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        FedALT(),
        *RIVALS,
        Half(),
        Scalar(),
        SelfIncluded(),
        TrainedRow(),
        Weighted(),
        ExactRow(),
        Similar(),
        OwnStart(),
        KeptOptimizer(),
        OneA(),
        Warm(),
        Relay(),
        RelayKept(),
    )
}


def get_method(name: str) -> Method:
    """The method of that name; ``InputError`` names the known ones."""
    if name not in METHODS:
        raise InputError(f"method: no method is named {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]

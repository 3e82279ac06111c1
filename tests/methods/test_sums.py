"""One broadcast sum gives every client the bits that the server's own ``combine`` gives it."""

import pytest
import torch

from fedalt.methods.fedalt import METHODS, FedALT
from fedalt.methods.method import Combined, Round
from fedalt.methods.rivals import FedIT
from fedalt.methods.server import row_of, total

ENOUGH = set(
    """fedalt fedalt-half fedalt-scalar fedalt-self fedalt-weighted fedalt-trained-row
    fedalt-own-start fedalt-kept-optimizer fedalt-one-a fedalt-relay fedalt-relay-kept fedit
    fedit+ft ffa-lora fedsa-lora feddpa""".split()
)


def updates(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    names = ("l.individual.a", "l.individual.b")
    sizes = 10.0 ** -(torch.arange(count) % 4).double()
    return {
        f"c{i}": {n: (torch.randn(7, 5, generator=generator) * sizes[i]).to(dtype) for n in names}
        for i in range(count)
    }


def bits(state):
    return {
        n: t.view(torch.int16 if t.element_size() == 2 else torch.int32) for n, t in state.items()
    }


def alike(one, other):
    one, other = bits(one), bits(other)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_the_methods_that_one_sum_serves() -> None:
    assert {name for name, method in METHODS.items() if method.sum_is_enough} == ENOUGH


@pytest.mark.parametrize("name", sorted(ENOUGH))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [3, 8])
def test_a_client_makes_of_the_sum_what_combine_gives_it(name, dtype, count) -> None:
    method, counted = METHODS[name], updates(count, dtype)
    examples = {client: 3 + 4 * i for i, client in enumerate([*counted, "absent"])}
    combined = method.combine(Round(1, counted, examples, alpha=16, rank=8))
    weights = {client: float(examples[client]) if method.by_examples else 1.0 for client in counted}
    broadcast = total(counted, weights)
    for client in (*counted, "absent"):
        made = method.install(broadcast, counted.get(client), weights.get(client, 1.0))
        assert alike(made, dict(combined.install(client))), client


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_two_the_others_alone_is_the_others_bits(dtype) -> None:
    """Also where a sum of both would lose them: what a server sends where two clients count."""
    one = {"x": torch.tensor([1e30, 0.1, -0.0, 3e-40]).to(dtype)}
    assert alike(row_of(total({"ann": one}, {"ann": 7.0})), one)


def test_a_row_in_range_is_the_others_even_out_of_the_sum_of_two() -> None:
    both = {c: {"x": torch.randn(200)} for c in ("ann", "bob")}
    whole = total(both)
    assert alike(row_of(whole, both["ann"]), both["bob"])


def test_who_alone_was_counted_gets_zeros() -> None:
    alone = {"ann": {"x": torch.randn(3)}}
    assert row_of(total(alone), alone["ann"])["x"].tolist() == [0.0, 0.0, 0.0]


def test_a_class_with_a_mean_of_its_own_inherits_no_yes() -> None:
    class Halved(FedALT):
        def row(self, round: Round):
            return lambda client: {}

    class Other(FedIT):
        def combine(self, round: Round) -> Combined:
            return Combined(lambda client: {})

    class Same(FedIT):
        pass

    assert not Halved.sum_is_enough
    assert not Other.sum_is_enough
    assert Same.sum_is_enough

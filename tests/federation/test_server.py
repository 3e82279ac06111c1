"""Aggregation, by hand on three clients."""

import pytest
import torch

from fedalt.methods import METHODS, get_method
from fedalt.server import mean, rest_of_world

UPDATES = [{"l.individual.a": torch.tensor([v, 2 * v])} for v in (1.0, 4.0, 10.0)]


def values(rows):
    return [row["l.individual.a"].tolist() for row in rows]


def test_rest_of_world_is_the_mean_of_the_others():
    assert values(rest_of_world(UPDATES)) == [[7.0, 14.0], [5.5, 11.0], [2.5, 5.0]]


def test_rest_of_world_of_two_is_the_other():
    assert values(rest_of_world(UPDATES[:2])) == [[4.0, 8.0], [1.0, 2.0]]


def test_rest_of_world_is_rounded_once():
    torch.manual_seed(0)
    updates = [{"a": torch.randn(50, dtype=torch.float32) * 10.0**k} for k in range(-3, 4)]
    for i, row in enumerate(rest_of_world(updates)):
        others = torch.stack([u["a"].double() for j, u in enumerate(updates) if j != i])
        exact = others.mean(0)
        largest = max(u["a"].abs().max().item() for u in updates)
        budget = exact.abs() * 2**-24 + 16 * 2**-53 * largest  # one fp32 rounding, a few fp64
        assert row["a"].dtype == torch.float32
        assert ((row["a"].double() - exact).abs() <= budget).all()


def test_mean_is_weighted():
    assert values([mean(UPDATES, [1, 1, 2])]) == [[6.25, 12.5]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rest_of_world(UPDATES[:1]), "at least two clients, got 1"),
        (lambda: mean([], []), "mean wants"),
        (lambda: mean(UPDATES, [1]), "mean wants a weight each, got 3 and 1"),
        (lambda: rest_of_world([*UPDATES, {"b": torch.zeros(2)}]), "do not both hold b"),
        (
            lambda: rest_of_world([*UPDATES, {"l.individual.a": torch.zeros(3)}]),
            r"have shapes \(2,\) and \(3,\)",
        ),
    ],
)
def test_bad_updates_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_methods_combine_by_hand():
    sizes = [1, 1, 2]
    assert values(METHODS["fedalt"].combine(UPDATES, sizes)) == [[7, 14], [5.5, 11], [2.5, 5]]
    assert values(METHODS["fedit"].combine(UPDATES, sizes)) == [[6.25, 12.5]] * 3
    assert values(METHODS["fedit+ft"].combine(UPDATES, sizes)) == [[6.25, 12.5]] * 3
    assert not METHODS["local"].sends


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="no method is named 'fedavg'; known: fedalt, local"):
        get_method("fedavg")

"""Leave-one-out and weighted means: by hand, and against brute force over the others."""

from dataclasses import replace
from fractions import Fraction
from itertools import combinations

import pytest
import torch

from fedalt.methods.fedalt import get_method
from fedalt.methods.server import leave_one_out, mean, rest_of_world
from fedalt.run import rounds

from .method_cases import run_nudged

UPDATES = [{"l.individual.a": torch.tensor([v, 2 * v])} for v in (1.0, 4.0, 10.0)]


def values(rows):
    return [row["l.individual.a"].tolist() for row in rows]


def test_rest_of_world_is_the_mean_of_the_others():
    assert values(rest_of_world(UPDATES)) == [[7.0, 14.0], [5.5, 11.0], [2.5, 5.0]]


def test_rest_of_world_is_weighted_where_weights_are_given():
    weights = {"0": 1.0, "1": 3.0, "2": 1.0}
    row = leave_one_out({str(i): update for i, update in enumerate(UPDATES)}, weights)
    assert values([row("0"), row("1"), row("2")]) == [[5.5, 11.0], [5.5, 11.0], [3.25, 6.5]]


def test_a_client_that_was_not_counted_gets_the_mean_of_all():
    row = leave_one_out({str(i): update for i, update in enumerate(UPDATES)})
    assert values([row("absent")]) == [[5.0, 10.0]]
    row = leave_one_out(dict(zip("abc", UPDATES, strict=True)), {"a": 2.0, "b": 2.0, "c": 1.0})
    assert values([row("absent")]) == [[4.0, 8.0]]


def test_the_only_counted_client_gets_zeros_and_others_its_adapter():
    row = leave_one_out({"a": UPDATES[1]})
    assert values([row("a"), row("b")]) == [[0.0, 0.0], [4.0, 8.0]]


@pytest.mark.parametrize("weights", [None, {"a": 3.0, "b": 7.0}])
def test_rest_of_world_of_two_is_the_other_bit_for_bit(weights):
    """Also where a sum would lose the small one: 1e30 + 1e-30 is 1e30 in fp64."""
    big, small = torch.tensor([1e30, 0.1, -0.0]), torch.tensor([1e-30, -0.3, -0.0])
    row = leave_one_out({"a": {"x": big}, "b": {"x": small}}, weights)
    assert torch.equal(row("a")["x"].view(torch.int32), small.view(torch.int32))
    assert torch.equal(row("b")["x"].view(torch.int32), big.view(torch.int32))
    assert row("a")["x"].data_ptr() != small.data_ptr()  # a copy, as of more clients


def spread(count, dtype, seed=0):
    """Updates whose sizes differ by four decades."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** -(torch.arange(count) % 5).double()
    drawn = torch.randn(count, 200, dtype=torch.float64, generator=generator) * sizes[:, None]
    return {f"c{i}": {"a": row.to(dtype)} for i, row in enumerate(drawn)}


def exact_mean(updates, weights):
    """``Σ w c / Σ w`` in rational numbers, rounded to fp64 at the very end."""
    columns = zip(*(updates[client]["a"].double().tolist() for client in weights), strict=True)
    total = sum(weights.values())
    means = [
        sum(w * Fraction(v) for w, v in zip(weights.values(), column, strict=True)) / total
        for column in columns
    ]
    return torch.tensor([float(m) for m in means], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_leave_one_out_of_any_subset_is_the_exact_mean_but_for_one_rounding(dtype, weighted):
    """Error at most ``u |mean|``, u half an ulp of the dtype, and what fp64 adds to it.

    The sum of n values, each weighted, loses at most ``n 2⁻⁵³ Σ w |c|``, taking one out as much as
    ``2⁻⁵³`` of the same again, and the division ``2⁻⁵³``; all over ``Σ w`` of the others. To 16
    bits PyTorch rounds by way of fp32, which adds ``2⁻²⁴ |mean|``.
    """
    updates = spread(7, dtype)
    unit = torch.finfo(dtype).eps / 2
    step = 0.0 if dtype == torch.float32 else 2.0**-24
    for count in (3, 5, 7):
        for chosen in list(combinations(updates, count))[:4]:
            counted = {client: updates[client] for client in chosen}
            weight = {c: 1 + 3 * i if weighted else 1 for i, c in enumerate(chosen)}
            row = leave_one_out(counted, {c: float(w) for c, w in weight.items()})
            for client in (*chosen, "absent"):
                others = {c: w for c, w in weight.items() if c != client}
                exact = exact_mean(updates, others)
                sizes = sum(w * updates[c]["a"].double().abs() for c, w in weight.items())
                lost = (count + 3) * 2.0**-53 * sizes / sum(others.values())
                smallest = torch.finfo(dtype).smallest_normal * unit  # half the spacing below it
                allowed = (unit + step * (1 + unit)) * exact.abs() + (1 + unit) * lost + smallest
                got = row(client)["a"]
                assert got.dtype == dtype
                assert ((got.double() - exact).abs() <= allowed).all()


def test_another_order_moves_a_leave_one_out_by_no_more_than_fp64_rounding():
    """The sum is in the order given; orders differ below the fp32 rounding, so by one ulp at most.

    The loop gives the clients' own order, whichever came first: see the next test.
    """
    updates = spread(6, torch.float32)
    forward = leave_one_out(updates)
    backward = leave_one_out(dict(reversed(updates.items())))
    for client in updates:
        one, other = forward(client)["a"], backward(client)["a"]
        assert ((one == other) | (one == torch.nextafter(other, one))).all()


def test_the_order_in_which_clients_finish_changes_no_bit(tiny_config, monkeypatch, tmp_path):
    config = replace(
        tiny_config, rounds=1, lora=replace(tiny_config.lora, target_modules=("q_proj",))
    )
    first = run_nudged(config, monkeypatch)
    drawn = rounds.drawn
    monkeypatch.setattr(rounds, "drawn", lambda *args: drawn(*args)[::-1])
    second = run_nudged(config, monkeypatch, out=str(tmp_path / "backward"))
    assert list(first.trained) == list(reversed(second.trained))
    for client in ("ann", "bob", "cyd"):
        one, two = first.saved(1).used(client).read(), second.saved(1).used(client).read()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_mean_is_weighted():
    assert values([mean(UPDATES, [1, 1, 2])]) == [[6.25, 12.5]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rest_of_world(UPDATES[:1]), "at least two clients, got 1"),
        (lambda: mean([], []), "mean wants"),
        (lambda: mean(UPDATES, [1]), "mean wants a weight each, got 3 and 1"),
        (lambda: rest_of_world([*UPDATES, {"b": torch.zeros(2)}]), "do not both hold b"),
        (lambda: rest_of_world([{}, *UPDATES]), "do not both hold l.individual.a"),
        (
            lambda: rest_of_world([*UPDATES, {"l.individual.a": torch.zeros(3)}]),
            r"have shapes \(2,\) and \(3,\)",
        ),
    ],
)
def test_bad_updates_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="no method is named 'fedavg'; known: fedalt, local"):
        get_method("fedavg")

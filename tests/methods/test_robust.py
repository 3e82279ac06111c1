"""Robust averages by hand and under attack, and what is refused at the door."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from fedalt.methods.fedalt import get_method
from fedalt.methods.robust import (
    Clipped,
    change_norm,
    fault,
    median,
    out_of_proportion,
    trimmed_mean,
)

from .method_cases import ROW_A, A, round_of, run_nudged, toys


def numbers(*values):
    return [{"x": torch.tensor([float(v)])} for v in values]


def test_trimmed_mean_by_hand():
    """Of 1, 2, 3, 10, 100 a fifth at both ends goes: (2 + 3 + 10) / 3."""
    assert trimmed_mean(numbers(100, 2, 10, 1, 3), 0.2)["x"].item() == 5
    assert trimmed_mean(numbers(100, 2, 10, 1, 3), 0.0)["x"].item() == torch.tensor(23.2).item()


@pytest.mark.parametrize(
    ("count", "trim", "cut"),
    [(7, 0.1, 0), (10, 0.1, 1), (7, 0.3, 2), (9, 0.49, 4), (100, 0.29, 29)],
)
def test_trimmed_mean_cuts_the_share_rounded_down(count, trim, cut):
    """Of 0, 1, 8, 27, ...: the kept ones' mean tells how many were cut."""
    cubes = [i**3 for i in range(count)]
    kept = cubes[cut : count - cut]
    got = trimmed_mean(numbers(*cubes), trim)["x"].item()
    assert got == torch.tensor(sum(kept) / len(kept)).item()


def test_median_by_hand():
    assert median(numbers(5, 1, 100))["x"].item() == 5
    assert median(numbers(5, 1, 100, 7))["x"].item() == 6
    assert median(numbers(5, 1, 100, 7, -30))["x"].item() == 5
    assert median(numbers(3))["x"].item() == 3


def test_every_number_has_its_own_middle():
    updates = [{"x": torch.tensor([1.0, 9.0])}, {"x": torch.tensor([2.0, 8.0])}]
    updates.append({"x": torch.tensor([30.0, -70.0])})
    assert median(updates)["x"].tolist() == [2, 8]


@pytest.mark.parametrize("bad", [1e30, -1e30, 0.5], ids=str)
@pytest.mark.parametrize(
    "average", [lambda u: trimmed_mean(u, 0.3), median], ids=["trimmed", "median"]
)
def test_two_bad_of_seven_move_no_number_out_of_the_good_ones_range(average, bad):
    """Whichever two they are. The mean does not hold where the bad ones are far."""
    good = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    lowest, highest = good.min(0).values, good.max(0).values
    for places in combinations(range(7), 2):
        rows = iter(good)
        updates = [{"x": torch.full((40,), bad) if i in places else next(rows)} for i in range(7)]
        got = average(updates)["x"]
        assert ((lowest <= got) & (got <= highest)).all()
    three_bad = [{"x": torch.full((40,), 1e30)}] * 3 + [{"x": row} for row in good[:4]]
    assert not (trimmed_mean(three_bad, 0.3)["x"] <= highest).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_robust_averages_keep_the_dtype(dtype):
    updates = [{"x": tensor["x"].to(dtype)} for tensor in numbers(1, 2, 6)]
    assert median(updates)["x"].dtype == trimmed_mean(updates, 0.1)["x"].dtype == dtype


def test_a_round_counts_clients_alike_and_leaves_the_own_one_out():
    """Medians of all three, and of the other two, which is their mean; weights have no say."""
    clients = toys()
    changes = {"aggregate": "median"}
    everyone = get_method("fedit").combine(round_of("fedit", clients, **changes)).install("ann")
    columns = zip(*(state[f"q.{A}"].flatten().tolist() for state in clients.values()), strict=True)
    assert everyone[f"q.{A}"].flatten().tolist() == [sorted(column)[1] for column in columns]
    row = get_method("fedalt").combine(round_of("fedalt", clients, **changes)).install("ann")
    wanted = (clients["bob"][f"q.{A}"] + clients["cyd"][f"q.{A}"]) / 2
    assert torch.equal(row[f"q.{ROW_A}"], wanted)


def test_clipping_keeps_the_direction_and_scales_the_step():
    """From (1, 1), a step of (6, 8), norm 10, taken at a half: (4, 5)."""
    before, update = {"x": torch.tensor([1.0, 1.0])}, {"x": torch.tensor([7.0, 9.0])}
    assert change_norm(update, before) == 10
    clipped = Clipped(update, before, 0.5)
    assert clipped["x"].tolist() == [4, 5]
    assert (list(clipped), len(clipped)) == (["x"], 1)
    assert change_norm(clipped, before) == 5


def test_a_clipped_round_scales_the_largest_change_down_to_the_median(tiny_config, monkeypatch):
    """Ann's nudge is the largest, bob's the median: ann counts as scaled, cyd and bob as they are.

    Lerp rounds the difference, its product and the sum: 3 · 2⁻²⁴ of the largest of them.
    """
    lora = replace(tiny_config.lora, target_modules=("q_proj",))
    federation = replace(tiny_config.federation, aggregate="clipped")
    config = replace(tiny_config, method="fedit", rounds=1, lora=lora, federation=federation)
    run = run_nudged(config, monkeypatch)
    before, trained = run.before[1, "ann"], run.counted(1).states
    norms = {
        client: sum(float((state[n].double() - before[n].double()).square().sum()) for n in state)
        ** 0.5
        for client, state in trained.items()
    }
    assert norms["ann"] > norms["bob"] > norms["cyd"]
    factor = norms["bob"] / norms["ann"]
    for name, got in run.saved(1).used("cyd").read().items():
        ann, bob, cyd = (trained[client][name].double() for client in ("ann", "bob", "cyd"))
        ann = before[name].double() + factor * (ann - before[name].double())
        wanted = (10 * ann + 6 * bob + 4 * cyd) / 20
        size = max(float(t[name].abs().max()) for t in (*trained.values(), before))
        assert ((got.double() - wanted).abs() <= 4 * 2.0**-24 * 2 * size).all()


def test_the_norm_of_a_change_is_over_all_tensors_and_of_nothing_zero():
    before = {"x": torch.zeros(1), "y": torch.zeros(2, 2)}
    assert change_norm({"x": torch.tensor([2.0]), "y": torch.full((2, 2), -2.0)}, before) == 20**0.5
    assert change_norm({}, {}) == 0
    large = {"x": torch.tensor([3e38])}
    assert change_norm(large, {"x": torch.zeros(1)}) == large["x"].double().item()


KNOWN = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        ({"a": KNOWN["a"]}, "b is missing"),
        ({**KNOWN, "c": torch.zeros(1)}, "c is not known here"),
        ({**KNOWN, "a": torch.zeros(3, 2)}, "a has shape (3, 2), wanted (2, 3)"),
        ({**KNOWN, "b": torch.zeros(3).half()}, "b is torch.float16, wanted torch.float32"),
        ({**KNOWN, "b": torch.tensor([0, float("nan"), float("inf")])}, "b holds NaN"),
        ({**KNOWN, "b": torch.tensor([0, 1, float("-inf")])}, "b holds an infinite number"),
        ({"a": KNOWN["a"] + 1, "b": KNOWN["b"] - 3e38}, None),
        ({}, "a is missing"),
    ],
)
def test_faults_are_named(update, reason):
    assert fault(update, KNOWN) == reason


def test_nothing_is_no_fault_where_nothing_is_wanted():
    assert fault({}, {}) is None


def test_who_is_out_of_proportion_is_told_with_the_numbers():
    norms = {"a": 1.0, "b": 2.0, "c": 20.0, "d": 20.5}
    assert out_of_proportion({**norms, "e": 1.5}, 10) == {
        "d": "its change has norm 20.5, more than 10 times the median 2"
    }
    assert out_of_proportion({"a": 1.0, "b": 1e9}, 1.5) == {}  # of two, nobody can say which
    assert out_of_proportion(norms, None) == {}
    assert out_of_proportion({}, 10) == {}

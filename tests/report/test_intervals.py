"""95 % intervals: Wilson's against its equation's own roots, the bootstrap against the normal."""

import math
import random

import pytest

from fedalt.report.intervals import Z, bootstrap, interval, wilson
from fedalt.report.summary import summarise


@pytest.mark.parametrize(("right", "records"), [(0, 10), (3, 10), (10, 10), (81, 200)])
def test_wilsons_ends_are_where_the_share_is_z_deviations_off(right, records):
    low, high = (end / 100 for end in wilson(right, records))
    share = right / records
    assert 0 <= low <= share <= high + 1e-12 <= 1 + 1e-9
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:  # at the corners p = 0 and 1 are roots themselves
            assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / records))


def test_wilsons_known_values():
    assert wilson(81, 263) == pytest.approx([25.53, 36.62], abs=0.02)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx([0, 16.11], abs=0.01)


def test_the_bootstrap_of_many_records_is_near_the_normal_and_always_the_same():
    draw = random.Random(0)
    scores = [draw.gauss(50, 20) for _ in range(400)]
    low, high = bootstrap(scores)
    assert (low, high) == tuple(bootstrap(scores))
    mean = sum(scores) / 400
    deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / 400)
    assert (high - low) / 2 == pytest.approx(Z * deviation / 20, rel=0.05)
    assert (high + low) / 2 == pytest.approx(mean, abs=0.3)
    assert bootstrap([7.0, 7.0]) == [7, 7]


def test_shares_need_no_scores_and_other_metrics_have_none_without():
    assert interval("accuracy", 30.0, 10, ()) == wilson(3, 10)
    assert interval("rouge1", 30.0, 10, ()) == []
    assert interval("accuracy", 30.0, 0, ()) == []


def test_a_client_has_the_interval_of_its_last_round_only():
    def scored(number, value):
        return {"event": "evaluate", "round": number, "client": "ann", "accuracy": value}

    answers = {"event": "answers", "round": 0, "client": "ann", "train": 5, "test": 10, "shown": []}
    results = summarise([scored(0, 30.0), answers])
    assert results["clients"]["ann"]["interval"] == wilson(3, 10)
    results = summarise([scored(0, 30.0), answers, scored(1, 50.0)])
    assert "interval" not in results["clients"]["ann"]
    assert results["clients"]["ann"]["records"] == {"train": 5, "test": 10}
    last = summarise([scored(0, 30.0), answers, scored(1, 50.0), answers | {"round": 1}])
    assert last["clients"]["ann"]["interval"] == wilson(5, 10)

"""Cuts of one dataset into clients: complete, disjoint, and as skewed as asked."""

import numpy as np
import pytest

from fedalt.config.schema import PartitionConfig
from fedalt.data.partition import client_id, cut, split_test
from fedalt.errors import InputError

LABELS = [str(i % 10) for i in range(4000)]
CUTS = [
    {"by": "dirichlet", "column": "label"},
    {"by": "pathological", "column": "label", "classes": 3},
    {"by": "equal"},
    {"by": "column", "column": "label"},
]


def cut_of(labels=LABELS, seed=0, **settings):
    return cut(PartitionConfig(**settings), len(labels), labels, seed)


def counts_of(clients, labels):
    """[labels, clients]"""
    names = sorted(set(labels))
    values = np.asarray(labels)
    return np.array([[(values[rows] == n).sum() for rows in clients.values()] for n in names])


@pytest.mark.parametrize("settings", CUTS, ids=lambda settings: settings["by"])
def test_every_record_goes_to_one_client(settings):
    clients = cut_of(**settings)
    rows = np.concatenate(list(clients.values()))
    assert np.array_equal(np.sort(rows), np.arange(len(LABELS)))
    assert all(np.all(np.diff(rows) > 0) for rows in clients.values())
    assert len(clients) == (10 if settings["by"] == "column" else 8)
    assert list(clients) == sorted(clients)


@pytest.mark.parametrize("settings", CUTS[:3], ids=lambda settings: settings["by"])
def test_a_cut_follows_its_seed_alone(settings):
    first, again, other = (cut_of(seed=seed, **settings) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_drawn_clients_have_padded_numbers():
    assert list(cut_of(by="equal"))[-1] == "client-07"
    assert list(cut_of(by="equal", clients=120))[3] == "client-003"


def test_equal_clients_differ_by_one_record_at_most():
    sizes = {len(rows) for rows in cut_of(by="equal", clients=7).values()}
    assert sizes == {571, 572}


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0, 10.0])
def test_dirichlet_shares_spread_as_their_distribution_says(alpha):
    """The squares of n shares from Dir(a, ..., a) sum to (1 + a) / (1 + n a) in the mean."""
    labels = [str(i % 500) for i in range(100_000)]
    clients = cut_of(labels, by="dirichlet", column="label", alpha=alpha, clients=10)
    shares = counts_of(clients, labels) / 200
    assert np.allclose(shares.sum(axis=1), 1)
    squares = (shares**2).sum(axis=1)
    error = squares.std() / np.sqrt(len(squares))
    assert abs(squares.mean() - (1 + alpha) / (1 + 10 * alpha)) < 4 * error


def test_clients_are_more_alike_the_higher_alpha_is():
    def entropy(alpha):
        counts = counts_of(cut_of(by="dirichlet", column="label", alpha=alpha), LABELS)
        shares = counts / counts.sum(axis=0)
        return -(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=0).mean()

    entropies = [entropy(alpha) for alpha in (0.1, 0.5, 2.0, 50.0)]
    assert entropies == sorted(entropies)
    assert entropies[-1] > 0.98 * np.log(10)


def test_no_client_has_fewer_than_min_records():
    labels = [str(i % 2) for i in range(400)]
    settings = {"by": "dirichlet", "column": "label", "alpha": 0.2, "clients": 6}
    smallest = [
        min(map(len, cut_of(labels, seed, min_records=2, **settings).values()))
        for seed in range(30)
    ]
    assert min(smallest) < 20  # so that the next line asks for something
    for seed in range(30):
        assert min(map(len, cut_of(labels, seed, min_records=20, **settings).values())) >= 20


def test_superclasses_are_shared_and_their_labels_follow():
    """Within a client the labels of one superclass come as a random draw without return does."""
    superclasses = {str(i): str(i % 3) for i in range(9)}
    labels = [str(i % 9) for i in range(27_000)]
    clients = cut_of(
        labels, by="dirichlet", column="fine", superclasses=superclasses, alpha=0.5, clients=5
    )
    counts = counts_of(clients, labels)
    for above in range(3):
        inside = counts[above::3]
        drawn = inside.sum(axis=0)
        assert drawn.sum() == 9000
        spread = np.sqrt(drawn * (1 / 3) * (2 / 3))
        assert np.all(np.abs(inside - drawn / 3) < 4.5 * spread + 1e-9)
    direct = [superclasses[label] for label in labels]
    same = cut_of(direct, by="dirichlet", column="coarse", alpha=0.5, clients=5)
    assert all(np.array_equal(same[name], clients[name]) for name in clients)


@pytest.mark.parametrize(("clients", "classes"), [(8, 3), (20, 2), (100, 10), (5, 2), (3, 10)])
def test_pathological_clients_have_exactly_that_many_labels(clients, classes):
    counts = counts_of(
        cut_of(by="pathological", column="label", clients=clients, classes=classes), LABELS
    )
    assert np.all((counts > 0).sum(axis=0) == classes)
    takers = (counts > 0).sum(axis=1)
    assert takers.max() - takers.min() <= 1
    for row in counts:
        assert row[row > 0].max() - row[row > 0].min() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "equal", "clients": 500}, "4000 records do not give 500 clients 10 each"),
        (
            {"by": "dirichlet", "column": "label", "alpha": 0.001, "clients": 40},
            "none of 1000 draws gave each of 40 clients 10 records; raise partition.alpha",
        ),
        ({"by": "pathological", "column": "label", "classes": 11}, "'label' has 10; lower"),
        (
            {"by": "pathological", "column": "label", "classes": 2, "clients": 4},
            "4 clients of 2 labels leave some of 10 labels over; raise partition.clients",
        ),
        (
            {"by": "dirichlet", "column": "label", "superclasses": {"0": "a"}},
            "partition.superclasses: no entry for the label '1'",
        ),
        (
            {"by": "column", "column": "label", "min_records": 401},
            r"'0' has fewer records \(400\) than partition.min_records \(401\)",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_line(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        cut_of(**settings)
    assert "\n" not in str(caught.value)


def test_a_label_with_fewer_records_than_takers_is_refused():
    labels = ["rare"] * 3 + ["often"] * 400
    with pytest.raises(InputError, match="a label with 3 records cannot be cut for 8 clients"):
        cut_of(labels, by="pathological", column="label", classes=2)


def test_values_become_file_names_and_collisions_are_refused():
    clients = cut_of(["b/c d"] * 10 + ["Émile"] * 10, by="column", column="who")
    assert list(clients) == ["b-c-d", "Émile"]
    assert client_id("..") == ""
    assert client_id("x" * 300) == "x" * 60
    assert client_id("é" * 300) == "é" * 30
    with pytest.raises(InputError, match="'a b' and 'a-b' make one name"):
        cut_of(["a b"] * 10 + ["a-b"] * 10, by="column", column="who")
    with pytest.raises(InputError, match="'A' and 'a' make one name"):
        cut_of(["a"] * 10 + ["A"] * 10, by="column", column="who")
    with pytest.raises(InputError, match="'/' makes no client's name"):
        cut_of(["/"] * 10, by="column", column="who")


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.77])
def test_test_rows_have_their_share_of_every_class(share):
    codes = np.repeat([0, 1, 2, 3, 4], [100, 37, 10, 2, 1])
    rows = np.arange(1000, 1000 + len(codes))
    train, test = split_test(rows, codes, share, np.random.default_rng(0))
    assert np.array_equal(np.sort(np.concatenate([train, test])), rows)
    assert len(test) == round(len(rows) * share)
    tested = np.bincount(codes[test - 1000], minlength=5)
    trained = np.bincount(codes[train - 1000], minlength=5)
    assert np.all(np.abs(tested - np.array([100, 37, 10, 2, 1]) * share) <= 1)
    assert np.all(trained > 0)
    assert not np.array_equal(np.sort(train), train)


@pytest.mark.parametrize("codes", [[0, 0], [0, 1], [0, 1, 2], [3, 3, 1], [0] * 5])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_small_clients_test_and_train_on_one_record_or_more(codes, share):
    codes = np.asarray(codes)
    train, test = split_test(np.arange(len(codes)), codes, share, np.random.default_rng(0))
    assert len(train) > 0
    assert len(test) > 0
    assert len(train) + len(test) == len(codes)

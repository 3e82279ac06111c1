"""Who takes part in a round, and what of the absent and the late still counts.

Expectations are worked out by hand from what the clients sent: with three clients a Rest-of-World
is the mean of the counted ones among the two others.
"""

from dataclasses import replace
from pathlib import Path

import pytest

import fedalt
from fedalt.config.schema import Config, FederationConfig
from fedalt.run.cohort import drawn, held_out, late, places
from fedalt.store.checkpoint import load_checkpoint
from tests.conftest import write_client
from tests.run.test_run import average, close, events_of, part, quick, same

NAMES = [f"client{i:02d}" for i in range(40)]


def federation(**settings):
    seed = settings.pop("seed", 0)
    return Config(seed=seed, federation=FederationConfig(**settings))


@pytest.mark.parametrize(
    ("share", "clients", "expected"), [(0.5, 40, 20), (0.1, 40, 4), (0.01, 40, 1), (1.0, 3, 3)]
)
def test_a_round_draws_the_stated_share_of_the_clients(share, clients, expected):
    cast = drawn(NAMES[:clients], 3, federation(participation=share))
    assert len(cast) == len(set(cast)) == expected
    assert cast == sorted(cast)  # in the clients' own order


def test_a_draw_is_the_same_again_and_another_in_another_round_or_under_another_seed():
    half = federation(participation=0.5)
    first = drawn(NAMES, 1, half)
    assert drawn(NAMES, 1, half) == first
    assert drawn(NAMES, 2, half) != first
    assert drawn(NAMES, 1, federation(participation=0.5, seed=1)) != first


def test_every_client_has_its_turn():
    """Of 40 clients, half drawn in each of 20 rounds, each misses all with probability 2^-20."""
    half = federation(participation=0.5)
    turns = [client for number in range(1, 21) for client in drawn(NAMES, number, half)]
    counts = [turns.count(name) for name in NAMES]
    assert min(counts) >= 2
    assert max(counts) <= 18
    assert sum(counts) == 20 * 20


def test_clients_that_are_away_are_not_drawn_and_others_take_their_places():
    away = {"client00": (1, 2), "client01": (1,)}
    settings = federation(participation=0.5, away=away)
    cast = drawn(NAMES[:4], 1, settings)
    assert cast == ["client02", "client03"]
    assert "client00" not in drawn(NAMES[:4], 2, settings)
    everyone = federation(away=away)
    assert drawn(NAMES[:4], 1, everyone) == ["client02", "client03"]
    assert drawn(NAMES[:4], 3, everyone) == NAMES[:4]


def test_stragglers_and_held_out_clients_are_shares_rounded_down():
    assert len(late(NAMES[:10], 1, federation(stragglers=0.25))) == 2
    assert late(NAMES[:3], 1, federation(stragglers=0.3)) == []
    assert len(held_out(NAMES[:10], federation(holdout=0.25))) == 2
    assert held_out(NAMES[:3], federation(holdout=0.3)) == []


@pytest.mark.parametrize(("share", "count", "floor"), [(0.7, 90, 63), (0.58, 50, 29)])
def test_shares_are_taken_as_they_were_written(share, count, floor):
    """In binary 0.7 · 90 and 0.58 · 50 fall just below 63 and 29, and 0.35 · 90 below 31.5."""
    names = [f"client{i}" for i in range(count)]
    assert len(late(names, 1, federation(stragglers=share))) == floor
    assert len(held_out(names, federation(holdout=share))) == floor
    assert places(90, federation(participation=0.35)) == 32


def test_who_is_late_does_not_follow_from_who_is_drawn():
    """Of the clients alone: half of them late, half of them drawn, are not the same half."""
    lates, draws = federation(stragglers=0.5), federation(participation=0.5)
    assert all(late(NAMES, n, lates) != drawn(NAMES, n, draws) for n in range(1, 21))


def rounds_of(config):
    """By round, the checkpoint; all are kept."""
    config = replace(config, save_total_limit=config.rounds + 1)
    fedalt.Federation(config).run()
    paths = [Path(config.out, "checkpoints", f"round-{n:04d}") for n in range(config.rounds + 1)]
    return [load_checkpoint(path) for path in paths]


def own(saved, client):
    return part(saved.used(client).read(), "individual")


def row(saved, client):
    return part(saved.used(client).read(), "rest_of_world")


def trained(config, number):
    return [e["client"] for e in events_of(config, "train") if e["round"] == number]


def test_with_half_the_clients_a_round_those_who_sit_out_keep_their_state_and_get_a_row(
    tiny_config, tmp_path
):
    write_client(tmp_path / "data" / "dan", "d", 4)
    config = quick(tiny_config, rounds=3, participation=0.5)
    saved = rounds_of(config)
    for number in (1, 2, 3):
        cast = trained(config, number)
        assert cast == drawn(["ann", "bob", "cyd", "dan"], number, config)
        assert len(cast) == 2
        sent = saved[number].record["sent"]
        for client in ("ann", "bob", "cyd", "dan"):
            before, after = own(saved[number - 1], client), own(saved[number], client)
            assert same(before, after) == (client not in cast)
            # all that have ever sent count, with their newest, for everyone but themselves
            others = [own(saved[number], other) for other in sent if other != client]
            assert close(row(saved[number], client), average(others, [1] * len(others)))


def test_a_client_that_leaves_counts_until_max_age_and_again_when_it_is_back(tiny_config):
    """cyd sends in round 1 and is away in 2 to 4; at age 2, in round 4, it no longer counts."""
    config = quick(tiny_config, rounds=5, max_age=1, away={"cyd": (2, 3, 4)})
    saved = rounds_of(config)
    assert [trained(config, n) for n in range(1, 6)] == [
        ["ann", "bob", "cyd"],
        ["ann", "bob"],
        ["ann", "bob"],
        ["ann", "bob"],
        ["ann", "bob", "cyd"],
    ]
    for number in (1, 2, 5):
        both = [own(saved[number], "bob"), own(saved[number], "cyd")]
        assert close(row(saved[number], "ann"), average(both, [1, 1]))
    assert same(own(saved[2], "cyd"), own(saved[1], "cyd"))
    for number in (3, 4):
        assert close(row(saved[number], "ann"), own(saved[number], "bob"))
    # the absent one still receives, so that it comes back to a fresh mean of all the others
    for number in range(1, 6):
        both = [own(saved[number], "ann"), own(saved[number], "bob")]
        assert close(row(saved[number], "cyd"), average(both, [1, 1]))


def test_a_straggler_moves_on_itself_and_its_update_counts_from_the_next_round(tiny_config):
    config = quick(tiny_config, rounds=2, stragglers=0.4)
    saved = rounds_of(config)
    names = ["ann", "bob", "cyd"]
    (first,), (second,) = (late(names, number, config) for number in (1, 2))
    assert [(e["round"], e["client"]) for e in events_of(config, "late")] == [
        (1, first),
        (2, second),
    ]
    assert trained(config, 1) == trained(config, 2) == names
    punctual = [name for name in names if name != first]
    # round 1: the straggler has never been counted; its own state has moved all the same
    for name in punctual:
        (other,) = (n for n in punctual if n != name)
        assert close(row(saved[1], name), own(saved[1], other))
    assert close(row(saved[1], first), average([own(saved[1], n) for n in punctual], [1, 1]))
    assert not same(own(saved[1], first), own(saved[0], first))
    # round 2: this round's straggler counts with what it had sent in round 1
    for name in names:
        others = [own(saved[1 if n == second else 2], n) for n in names if n != name]
        assert close(row(saved[2], name), average(others, [1, 1]))


def test_an_average_counts_only_who_is_there(tiny_config):
    """Methods that install one mean for all have no use for what an absent client once sent."""
    config = quick(tiny_config, rounds=2, method="fedit", away={"bob": (2,)})
    local = quick(tiny_config, rounds=2, method="fedit+ft", away={"bob": (2,)})
    local = replace(local, out=config.out + "-local")
    saved, tuned = rounds_of(config)[2], rounds_of(local)[2]
    states = [tuned.used(client).read() for client in ("ann", "cyd")]
    assert close(saved.used("bob").read(), average(states, [10, 4]))


@pytest.mark.parametrize("away", [(1,), (2,)])
def test_a_round_below_the_minimum_cohort_combines_nothing(tiny_config, away):
    """Two of three are away: the third trains on, and nobody's Rest-of-World is replaced."""
    config = quick(tiny_config, away={"ann": away, "bob": away}, max_age=0)
    saved = rounds_of(config)
    (number,) = away
    (thin,) = events_of(config, "thin")
    assert (thin["round"], thin["reason"]) == (
        number,
        "1 good updates, federation.min_clients is 2",
    )
    for client in ("ann", "bob", "cyd"):
        assert same(row(saved[number], client), row(saved[number - 1], client))
        moved = not same(own(saved[number], client), own(saved[number - 1], client))
        assert moved == (client == "cyd")
    assert "too few clients" in Path(config.out, "report", "report.html").read_text()


def test_a_round_below_the_minimum_cohort_keeps_what_the_server_has(tiny_config):
    """What FLoRA has added to the base, and what a newcomer installs."""
    config = quick(tiny_config, method="flora", away={"ann": (2,), "bob": (2,)})
    _, first, second = rounds_of(config)
    assert [thin["round"] for thin in events_of(config, "thin")] == [2]
    for name in ("base", "newcomer"):
        assert same(second.state("server", name).read(), first.state("server", name).read())


def test_a_higher_minimum_cohort_is_enforced(tiny_config):
    with pytest.raises(fedalt.InputError, match="fedalt wants 4 clients or more, got 3"):
        fedalt.Federation(quick(tiny_config, min_clients=4)).run()
    assert not Path(tiny_config.out).exists()
    config = quick(tiny_config, rounds=2, min_clients=3, stragglers=0.4)
    rounds_of(config)
    (thin,) = events_of(config, "thin")  # the late one's counts in the second round
    assert thin["reason"] == "2 good updates, federation.min_clients is 3"


def test_everybody_away_is_a_round_without_training(tiny_config):
    away = {name: (1,) for name in ("ann", "bob", "cyd")}
    config = quick(tiny_config, away=away)
    saved = rounds_of(config)
    assert trained(config, 1) == []
    assert trained(config, 2) == ["ann", "bob", "cyd"]
    assert len(events_of(config, "thin")) == 1
    for client in away:
        assert same(saved[0].used(client).read(), saved[1].used(client).read())


def test_an_absent_client_is_scored_but_moves_no_bytes(tiny_config):
    config = quick(tiny_config, rounds=2, away={"cyd": (2,)})
    results = fedalt.Federation(config).run().results
    ann, cyd = results["clients"]["ann"], results["clients"]["cyd"]
    assert (ann["trained_rounds"], cyd["trained_rounds"]) == (2, 1)
    assert cyd["sent"] * 2 == ann["sent"] > 0
    assert cyd["received"] * 2 == ann["received"] > 0
    assert cyd["last"]["round"] == 2


def test_a_name_that_is_away_must_be_a_clients(tiny_config):
    with pytest.raises(fedalt.InputError, match=r"federation\.away: no client 'zoe'; known: ann"):
        fedalt.Federation(quick(tiny_config, away={"zoe": (1,)})).run()
    assert not Path(tiny_config.out).exists()


def test_adapters_are_scored_alone_unless_that_is_turned_off(tiny_config, tmp_path):
    quiet = replace(
        tiny_config, out=str(tmp_path / "q"), evaluate=replace(tiny_config.evaluate, parts=False)
    )
    with_parts, without = (fedalt.Federation(c).run().results for c in (tiny_config, quiet))
    assert {"individual", "rest_of_world"} <= with_parts["clients"]["ann"].keys()
    assert not {"individual", "rest_of_world"} & without["clients"]["ann"].keys()
    assert with_parts["clients"]["ann"]["last"] == without["clients"]["ann"]["last"]

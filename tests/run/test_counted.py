"""What last counted of a client, where that is not what the client itself has.

Training is a nudge, ann's the largest and cyd's the smallest, so that clipping holds ann back in
every round. Who counts with what is followed by hand, in fp64.
"""

import statistics
from dataclasses import replace

import pytest
import torch

import fedalt
from fedalt.model.states import select
from fedalt.run.cohort import late
from fedalt.store.checkpoint import COUNTED
from tests.methods.method_cases import EXAMPLES, A, B, Counted, assert_equal, renamed, run_nudged
from tests.run.test_run import cut_short, quick, record_of


@pytest.fixture
def config(tiny_config):
    return replace(tiny_config, lora=replace(tiny_config.lora, target_modules=("q_proj",)))


def doubles(state, *ends):
    return {name: tensor.double() for name, tensor in state.items() if name.endswith(ends)}


def distance(left, right):
    return sum(float((left[name] - right[name]).square().sum()) for name in right) ** 0.5


def towards(last, update, factor):
    return {name: last[name] + factor * (update[name] - last[name]) for name in last}


@pytest.mark.parametrize(
    "settings", [{}, {"away": {"ann": (2, 3)}}, {"stragglers": 0.4}], ids=["all", "away", "late"]
)
def test_clipping_bounds_how_far_what_counts_of_a_client_moves(settings, config, monkeypatch):
    """What is held back in a round does not count whole in the next.

    Installed is the mean of what counts of the others; a late update counts, clipped, from the next
    round. Lerp and the mean round to fp32 a few times, of numbers below 4.
    """
    federation = replace(config.federation, aggregate="clipped", **settings)
    config = replace(config, federation=federation, rounds=4)
    run = run_nudged(config, monkeypatch)
    last = {client: doubles(run.saved(0).used(client), A, B) for client in EXAMPLES}
    ever, held_back = set(), []
    for number in range(1, 5):
        updates = {c: doubles(s, A, B) for c, s in run.counted(number).states.items()}
        norms = {client: distance(update, last[client]) for client, update in updates.items()}
        middle = statistics.median(norms.values())
        now = dict(last)
        for client, update in updates.items():
            now[client] = towards(last[client], update, min(1.0, middle / norms[client]))
            assert distance(now[client], last[client]) <= middle * (1 + 2**-40)
        missing = late(list(updates), number, config)
        counts = {c: (last if c in missing or c not in updates else now)[c] for c in EXAMPLES}
        counts = {c: s for c, s in counts.items() if c in ever or c in set(updates) - set(missing)}
        for client in EXAMPLES:
            others = [counts[other] for other in counts if other != client]
            used = run.saved(number).used(client)
            for name in others[0]:
                got = used[next(iter(renamed({name: 0})))].double()
                wanted = sum(other[name] for other in others) / len(others)
                assert torch.allclose(got, wanted, rtol=0, atol=2**-18)
        last, ever = now, ever | set(updates)
        held_back.append(distance(last["ann"], doubles(run.saved(number).used("ann"), A, B)))
    assert min(held_back) > 0.1


def test_where_what_was_sent_is_installed_anew_clipping_starts_from_that(config, monkeypatch):
    """FedAvg's second round: all start from the first one's mean, and so do their changes."""
    federation = replace(config.federation, aggregate="clipped")
    run = run_nudged(replace(config, federation=federation, method="fedit"), monkeypatch)
    start = doubles(run.saved(1).used("ann"), A, B)
    updates = {c: doubles(s, A, B) for c, s in run.counted(2).states.items()}
    norms = {client: distance(update, start) for client, update in updates.items()}
    middle = sorted(norms.values())[1]
    counts = {c: towards(start, u, min(1.0, middle / norms[c])) for c, u in updates.items()}
    for name, got in run.saved(2).used("ann").items():
        wanted = sum(EXAMPLES[c] * counts[c][name] for c in EXAMPLES) / 20
        assert torch.allclose(got.double(), wanted, rtol=0, atol=2**-18)
    assert not any(run.saved(2).has(COUNTED, client) for client in EXAMPLES)


def test_it_is_stored_only_where_the_clients_own_state_is_not_the_same(config, monkeypatch):
    run = run_nudged(config, monkeypatch)
    assert not (run.saved(2).path / COUNTED).exists()
    federation = replace(config.federation, aggregate="clipped")
    config = replace(config, federation=federation, out=f"{config.out}-clipped")
    run = run_nudged(config, monkeypatch)
    assert [run.saved(2).has(COUNTED, client) for client in EXAMPLES] == [True, False, False]
    kept, own = run.saved(2).state(COUNTED, "ann"), run.saved(2).used("ann")
    assert set(kept) == set(select(own, "individual"))


def test_an_absent_client_of_a_warm_start_counts_with_what_it_sent(config, monkeypatch):
    """Cyd trains in round 1 only; the mean that was then installed over it is no word of cyd's."""
    federation = replace(config.federation, away={"cyd": (2, 3)})
    config = replace(config, method="fedalt-warm", federation=federation, rounds=3)
    run = run_nudged(config, monkeypatch)
    first = run.trained[1, "cyd"]
    second = Counted({**run.counted(2).states, "cyd": first}).mean(A, B)
    for client in EXAMPLES:
        assert_equal(select(run.saved(2).used(client), "individual"), second)
    third = Counted({**run.counted(3).states, "cyd": first})
    for client in EXAMPLES:
        row = renamed(third.mean(A, B, weights=third.others(client)))
        assert_equal(select(run.saved(3).used(client), "rest_of_world"), row)


def test_a_client_that_never_sent_has_nothing_that_counts(config, monkeypatch):
    """A mean installed over its first state is not taken for an update of its own."""
    federation = replace(config.federation, away={"cyd": (1, 2)})
    run = run_nudged(replace(config, method="fedalt-warm", federation=federation), monkeypatch)
    assert not run.saved(2).has(COUNTED, "cyd")
    mean = run.counted(2).mean(A, B, weights={"ann": 10, "bob": 6})
    assert_equal(select(run.saved(2).used("cyd"), "individual"), mean)


@pytest.mark.parametrize("method", ["fedalt", "fedalt-warm"])
@pytest.mark.parametrize("stopped_at", [7, 13])
def test_a_resume_with_clipping_and_absent_clients_ends_in_the_same_bits(
    method, stopped_at, tiny_config, tmp_path
):
    """Ctrl-C in round 2 or 3 of 4; both find counted updates in the checkpoint."""
    settings = {"aggregate": "clipped", "stragglers": 0.4, "away": {"ann": (3,)}}
    config = quick(tiny_config, method=method, rounds=4, **settings)
    uncut = replace(config, out=str(tmp_path / "uncut"))
    fedalt.Federation(uncut).run()
    cut_short(config, stopped_at)
    fedalt.Federation(config).run(resume=True)
    record = record_of(tmp_path / "uncut")
    assert record == record_of(tmp_path / "run")
    assert any(f"/{COUNTED}/" in name for name in record)

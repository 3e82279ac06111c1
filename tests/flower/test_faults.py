"""Sites that are killed, lost, late, spoilt or strangers; and a server that is killed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedalt
from fedalt.flower import mail
from fedalt.flower.parcel import HELLO, ROUND, Parcel
from fedalt.run import turns as run_turns
from fedalt.store import checkpoint
from tests.conftest import write_client
from tests.flower.loopback import (
    alike,
    events,
    federation,
    last_states,
    serve,
    small,
    states_of_run,
)

CLIENTS = ("ann", "bob", "cyd")


class Killed(BaseException):
    """Ends a process as SIGKILL does: nothing catches it."""


@pytest.fixture
def config(tiny_config):
    evaluate = replace(tiny_config.evaluate, every=2, parts=False, answers=0, max_new_tokens=2)
    return small(tiny_config, rounds=2, evaluate=evaluate)


@pytest.fixture
def expected(config):
    fedalt.Federation(config).run()
    return states_of_run(Path(config.out), config.rounds)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_client_whose_process_dies_is_asked_again(config, expected, tmp_path, when):
    died = []

    def fault(node, kind, parcel, honest):
        if (node, kind) == (2, ROUND) and parcel.values["round"] == 2 and not died:
            died.append(honest() if when == "after" else None)
            return "ClientApp stopped responding."
        return honest()

    link = federation(config, tmp_path / "sites")
    link.fault = fault
    serve(link, config, tmp_path)
    assert died
    assert alike(last_states(tmp_path / "sites"), expected)
    assert not events(tmp_path, "fail")


def test_a_site_killed_at_every_write_ends_in_the_same_bits(
    config, expected, tmp_path, monkeypatch
):
    """Of every message the first process dies at its first write, the next one at its second ..."""
    monkeypatch.setattr(mail, "ATTEMPTS", 1000)
    honest_write, left = checkpoint.writing, [0]
    tries: dict[str, int] = {}

    def writing(path):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return honest_write(path)

    def fault(node, kind, parcel, honest):
        key = f"{node} {kind} {parcel.values.get('round')}"
        tries[key] = left[0] = tries.get(key, 0) + 1
        monkeypatch.setattr(checkpoint, "writing", writing)
        try:
            return honest()
        except Killed:
            return "ClientApp stopped responding."
        finally:
            monkeypatch.setattr(checkpoint, "writing", honest_write)

    config = replace(config, evaluate=replace(config.evaluate, parts=False, answers=0))
    link = federation(config, tmp_path / "sites", CLIENTS[:2])
    link.fault = fault
    two = replace(config, data=replace(config.data, clients=CLIENTS[:2]), out=f"{config.out}-2")
    fedalt.Federation(two).run()
    serve(link, config, tmp_path)
    assert min(tries[f"1 {ROUND} {n}"] for n in (1, 2)) > 5
    ended = last_states(tmp_path / "sites", CLIENTS[:2])
    assert alike(ended, states_of_run(Path(two.out), 2, CLIENTS[:2]))


def test_a_node_that_comes_back_under_another_id_goes_on(config, expected, tmp_path):
    link = federation(config, tmp_path / "sites")

    def fault(node, kind, parcel, honest):
        if (node, kind) == (2, ROUND) and parcel.values["round"] == 2:
            link.gone.add(2)
            link.sites[9] = link.sites[2]
            return None
        return honest()

    link.fault = fault
    serve(link, config, tmp_path)
    assert alike(last_states(tmp_path / "sites"), expected)


def test_a_node_that_comes_back_before_it_is_missed_goes_on_once_it_is(config, expected, tmp_path):
    """Flower misses a node after two heartbeats; until then its client has another one, which is
    turned away, and taken in later.
    """
    link = federation(config, tmp_path / "sites")

    def fault(node, kind, parcel, honest):
        if (node, kind) == (2, ROUND) and parcel.values["round"] == 2:
            link.sites[9], link.leaving = link.sites[2], {2: link.waits + 2}
            return None
        return honest()

    link.fault = fault
    serve(link, config, tmp_path)
    (turned,) = events(tmp_path, "refuse")
    assert "node 9: client 'bob' is node 2, which is there" in turned["reason"]
    assert alike(last_states(tmp_path / "sites"), expected)


@pytest.mark.parametrize("place", [3, 5, 8, 10])
def test_a_server_that_is_killed_goes_on_with_the_same_command(config, tmp_path, place, expected):
    """At any message: the sites answer from their disks what they have done already."""
    link = federation(config, tmp_path / "sites")

    def fault(node, kind, parcel, honest):
        if len(link.sent) == place:
            honest()
            raise Killed
        return honest()

    link.fault = fault
    with pytest.raises(Killed):
        serve(link, config, tmp_path)
    again = federation(config, tmp_path / "sites")
    serve(again, config, tmp_path)
    assert alike(last_states(tmp_path / "sites"), expected)
    assert {e["client"] for e in events(tmp_path, "train") if e["round"] == 1} == set(CLIENTS)


def spoil(update):
    first = sorted(update)[0]
    tensor = update[first].clone()
    tensor[0, 0] = torch.nan
    return {**update, first: tensor}


BAD = {
    "nan": (spoil, "holds NaN"),
    "shape": (lambda u: {n: t[:1] for n, t in u.items()}, "has shape (1, 32), wanted (2, 32)"),
    "name": (lambda u: {**u, "mixer": torch.ones(1)}, "mixer is not known here"),
    "nothing": (lambda u: {}, "is missing"),
    "norm": (lambda u: {n: 1000 * (t + 1) for n, t in u.items()}, "more than 10 times the median"),
}


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("nan", "fedalt"),
        ("shape", "fedit"),
        ("name", "fedalt"),
        ("nothing", "fedit"),
        ("norm", "fedalt"),
        ("norm", "fedit"),
    ],
)
def test_a_bad_update_is_refused_as_in_one_process(config, tmp_path, case, method, monkeypatch):
    """Spoilt on its way in both: the sites end with the bits of the run that refuses it too."""
    change, reason = BAD[case]
    write_client(tmp_path / "data" / "dan", "d", 4)
    clients = (*CLIENTS, "dan")
    config = replace(config, method=method)
    turns = []

    def hand_in(state, parts, client):
        update = honest_hand_in(state, parts, client)
        turns.append(client)
        return change(update) if client == "bob" and turns.count("bob") == 2 else update

    honest_hand_in = run_turns.hand_in
    monkeypatch.setattr(run_turns, "hand_in", hand_in)
    fedalt.Federation(config).run()
    monkeypatch.setattr(run_turns, "hand_in", honest_hand_in)

    def fault(node, kind, parcel, honest):
        answer = honest()
        if (node, kind) == (2, ROUND) and parcel.values["round"] == 2:
            return Parcel(answer.values, {"update": change(answer.states["update"])})
        return answer

    link = federation(config, tmp_path / "sites", clients)
    link.fault = fault
    serve(link, config, tmp_path)
    (refused,) = events(tmp_path, "refuse")
    assert refused["client"] == "bob"
    assert reason in refused["reason"]
    one = states_of_run(Path(config.out), 2, clients)
    assert alike(last_states(tmp_path / "sites", clients), one)
    (mine,) = events(tmp_path / "sites", "refuse", "bob")
    assert reason in mine["reason"]


def test_a_site_refuses_its_own_nan(config, tmp_path, monkeypatch):
    honest = run_turns.train_client

    def train(model, examples, *args, **more):
        done = honest(model, examples, *args, **more)
        if len(examples) == 6:  # bob
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(torch.nan)
                    break
        return done

    monkeypatch.setattr(run_turns, "train_client", train)
    link = federation(config, tmp_path / "sites")
    serve(link, config, tmp_path)
    assert {e["client"] for e in events(tmp_path, "refuse")} == {"bob"}
    assert all(t.isfinite().all() for t in last_states(tmp_path / "sites")["bob"].values())


def test_a_site_that_raises_loses_its_round_and_writes_down_why(config, tmp_path, monkeypatch):
    honest = run_turns.train_client

    def train(model, examples, *args, **more):
        if len(examples) == 6:
            raise RuntimeError("no more today")
        return honest(model, examples, *args, **more)

    monkeypatch.setattr(run_turns, "train_client", train)
    serve(federation(config, tmp_path / "sites"), config, tmp_path)
    failed = events(tmp_path, "fail")
    assert [(e["client"], e["round"]) for e in failed] == [("bob", 1), ("bob", 2)]
    assert "RuntimeError: no more today" in failed[0]["reason"]
    assert "no more today" in (tmp_path / "sites" / "bob" / "errors.log").read_text()
    assert events(tmp_path / "sites", "fail", "bob")


def test_a_site_that_never_answers_is_absent_and_the_rounds_go_on(config, tmp_path):
    """Its last update counts, up to max_age, as that of an absent client in one process."""
    config = replace(config, rounds=3)
    config = replace(config, federation=replace(config.federation, round_timeout=0.5))
    away = replace(config, federation=replace(config.federation, away={"bob": (2, 3)}))
    fedalt.Federation(away).run()

    def fault(node, kind, parcel, honest):
        silent = node == 2 and kind != HELLO and parcel.values["round"] > 1
        return None if silent else honest()

    link = federation(config, tmp_path / "sites")
    link.fault = fault
    serve(link, config, tmp_path)
    late = events(tmp_path, "late")
    assert [(e["client"], e["round"]) for e in late] == [("bob", 2), ("bob", 3)]
    assert late[0]["reason"] == "no answer within 0.5 s"
    pair = ("ann", "cyd")
    assert alike(last_states(tmp_path / "sites", pair), states_of_run(Path(away.out), 3, pair))


def test_a_late_answer_counts_from_the_next_round(config, tmp_path):
    """As a straggler's in one process: it is drawn no more, and its late update counts on."""
    config = replace(config, rounds=3)
    config = replace(config, federation=replace(config.federation, round_timeout=0.5))
    kept = []

    def fault(node, kind, parcel, honest):
        if node == 2 and kind == ROUND and parcel.values["round"] == 2:
            kept.append((str(len(link.sent)), honest()))
            return None
        if node == 1 and kind == ROUND and parcel.values["round"] == 3:
            link.box[kept[0][0]] = kept[0][1]
        return honest()

    link = federation(config, tmp_path / "sites")
    link.fault = fault
    serve(link, config, tmp_path)
    reasons = [e.get("reason") for e in events(tmp_path, "late")]
    assert reasons == ["no answer within 0.5 s"]  # in round 3 it hands in what that round trained
    assert [e["round"] for e in events(tmp_path, "train") if e["client"] == "bob"] == [1, 3]

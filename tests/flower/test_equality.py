"""Sites with a folder each end with the bits and the scores of one process."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

import fedalt
from fedalt.flower.parcel import ROUND
from fedalt.flower.site import Site
from fedalt.model import states
from fedalt.report.events import read_events
from fedalt.serving import evaluate_run
from fedalt.store.checkpoint import StoredState
from tests.conftest import write_client
from tests.flower.loopback import (
    alike,
    events,
    federation,
    last_states,
    own_settings,
    serve,
    small,
    states_of_run,
)

CLIENTS = ("ann", "bob", "cyd")
FOUR = (*CLIENTS, "dan")
BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def one_process(config, clients=CLIENTS):
    fedalt.Federation(config).run()
    return states_of_run(Path(config.out), config.rounds, clients)


def told(out, client, *without):
    """What a run tells of a client, but for the bytes that moved."""
    events = read_events(Path(out) / "metrics.jsonl")
    without = ("traffic", *without)
    return [e for e in events if e["client"] == client and e["event"] not in without]


@pytest.mark.parametrize(
    "method",
    ["fedalt", "fedalt-relay", "fedit", "fedit+ft", "fedalt-kept-optimizer"],
)
def test_three_sites_end_with_the_bits_and_events_of_one_process(tiny_config, tmp_path, method):
    config = small(tiny_config, method=method)
    expected = one_process(config)
    serve(federation(config, tmp_path / "sites"), config, tmp_path)
    assert alike(last_states(tmp_path / "sites"), expected)
    for client in CLIENTS:
        assert told(tmp_path / "sites" / client, client) == told(config.out, client)


@pytest.mark.parametrize("method", ["fedalt-weighted", "fedsa-lora", "feddpa"])
def test_so_do_those_of_other_methods(tiny_config, tmp_path, method):
    config = small(tiny_config, method=method, rounds=2)
    expected = one_process(config)
    serve(federation(config, tmp_path / "sites"), config, tmp_path)
    assert alike(last_states(tmp_path / "sites"), expected)


FEDERATIONS = {
    "half drawn": {"participation": 0.5},
    "away": {"away": {"bob": (2, 3)}},
    "late": {"stragglers": 0.5},
    "forgotten": {"away": {"bob": (2, 3, 4)}, "max_age": 1},
    "thin": {"away": {"ann": (2,), "bob": (2,), "dan": (2,)}, "max_age": 0},
}


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *((case, "fedalt") for case in FEDERATIONS),
        ("late", "fedalt-relay"),
        ("thin", "fedalt-relay"),
    ],
)
def test_who_is_drawn_away_or_late_changes_no_bit(tiny_config, tmp_path, case, method):
    """Who was not asked in a round scores nothing in it, and ends with the same bits."""
    write_client(tmp_path / "data" / "dan", "d", 4)
    config = small(tiny_config, method=method, rounds=4)
    config = replace(config, evaluate=replace(config.evaluate, every=4, parts=False))
    config = replace(config, federation=replace(config.federation, **FEDERATIONS[case]))
    expected = one_process(config, FOUR)
    serve(federation(config, tmp_path / "sites", FOUR), config, tmp_path)
    assert alike(last_states(tmp_path / "sites", FOUR), expected)
    for client in FOUR:
        seldom = ("evaluate", "gates", "answers", "part")
        mine = told(tmp_path / "sites" / client, client, *seldom)
        assert mine == told(config.out, client, *seldom)


def test_two_sites_get_each_others_bits(tiny_config, tmp_path):
    config = small(tiny_config, rounds=2)
    config = replace(config, data=replace(config.data, clients=("ann", "bob")))
    expected = one_process(config, ("ann", "bob"))
    serve(federation(config, tmp_path / "sites", ("ann", "bob")), config, tmp_path)
    assert alike(last_states(tmp_path / "sites", ("ann", "bob")), expected)


def test_eight_sites_too(tiny_config, tmp_path):
    clients = tuple("abcdefgh")
    for number, client in enumerate(clients):
        write_client(tmp_path / "eight" / client, client, 4 + number)
    config = small(
        tiny_config, rounds=1, data=replace(tiny_config.data, path=str(tmp_path / "eight"))
    )
    expected = one_process(config, clients)
    serve(federation(config, tmp_path / "sites", clients), config, tmp_path)
    assert alike(last_states(tmp_path / "sites", clients), expected)


QUANTIZED = [
    "fp8",
    pytest.param("int8", marks=BITSANDBYTES),
    pytest.param("nf4", marks=BITSANDBYTES),
]


def on_base(config, **changes):
    return replace(config, model=replace(config.model, **changes))


def test_a_base_in_bfloat16(tiny_config, tmp_path):
    config = on_base(small(tiny_config, rounds=1), dtype="bfloat16")
    expected = one_process(config)
    serve(federation(config, tmp_path / "sites"), config, tmp_path)
    assert alike(last_states(tmp_path / "sites"), expected)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_base_on_all_sites(tiny_config, tmp_path, kind):
    config = on_base(small(tiny_config, rounds=2), quantization=kind)
    expected = one_process(config)
    serve(federation(config, tmp_path / "sites"), config, tmp_path)
    assert alike(last_states(tmp_path / "sites"), expected)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_site_that_alone_is_quantized_takes_part(tiny_config, tmp_path, kind):
    """It hands in what it would in a run whose base is stored so, the others what they would."""
    config = small(tiny_config, rounds=1)
    link = federation(config, tmp_path / "sites")
    own = own_settings(config, "bob", tmp_path / "sites") | {"model.quantization": kind}
    link.sites[2] = Site(own)
    serve(link, config, tmp_path)
    assert not events(tmp_path, "refuse")
    handed = {client: handed_in(tmp_path, client) for client in CLIENTS}
    for name, stored in (("plain", "none"), ("stored", kind)):
        run = on_base(replace(config, out=str(tmp_path / name)), quantization=stored)
        trained = one_process(run)
        whose = ("bob",) if stored == kind else ("ann", "cyd")
        for client in whose:
            mine = {tensor: trained[client][tensor] for tensor in handed[client]}
            assert alike({client: mine}, {client: handed[client]})
    assert {e["client"] for e in events(tmp_path, "train")} == set(CLIENTS)


def handed_in(root, client):
    return StoredState(root / "sites" / client / "handed" / "round-0001.safetensors").read()


def test_digits_whose_labels_meet_first(tmp_path):
    """Sites hold some labels each; the model is made of all."""
    config = fedalt.load_config(
        "digits", ("rounds=1", "train.max_steps=2", "evaluate.parts=false", "threads=1")
    )
    names = ("client-0", "client-1", "client-2")
    clients = [client.id for client in _digits(config)][:3] if names else []
    config = replace(config, out=str(tmp_path / "run"))
    config = replace(config, data=replace(config.data, clients=tuple(clients)))
    expected = one_process(config, clients)
    link = federation(config, tmp_path / "sites", clients)
    for node, client in enumerate(clients, start=1):
        own = own_settings(config, client, tmp_path / "sites")
        link.sites[node] = Site(own | {"data.path": "digits", "data.clients": [client]})
    serve(link, config, tmp_path)
    assert alike(last_states(tmp_path / "sites", clients), expected)


def _digits(config):
    from fedalt.data import load_clients

    return load_clients(config.data, config.partition, config.seed)


def test_a_sites_folder_is_a_run_with_one_client(tiny_config, tmp_path):
    config = small(tiny_config, rounds=1)
    serve(federation(config, tmp_path / "sites"), config, tmp_path)
    out = tmp_path / "sites" / "ann"
    model, _ = fedalt.load_client(out, "ann")
    held = states.adapter_state(model)
    assert alike({"ann": held}, last_states(tmp_path / "sites", ("ann",)))
    assert "ann" in evaluate_run(out)
    assert (out / "results.json").is_file()
    assert (out / "report" / "report.html").is_file()


def test_the_servers_report_has_every_site_and_its_scores(tiny_config, tmp_path):
    config = small(tiny_config, rounds=2)
    serve(federation(config, tmp_path / "sites"), config, tmp_path)
    fedalt.Federation(config).run()
    for client in CLIENTS:
        sites, one = (
            [e for e in told(out, client) if e["event"] in ("train", "evaluate")]
            for out in (tmp_path / "server", config.out)
        )
        assert sorted(map(str, sites)) == sorted(map(str, one))
    assert (tmp_path / "server" / "results.json").is_file()


def test_a_message_has_the_sum_and_none_has_a_sites_settings(tiny_config, tmp_path):
    config = small(tiny_config, rounds=2)
    link = federation(config, tmp_path / "sites")
    serve(link, config, tmp_path)
    rounds = [parcel for _, kind, parcel in link.sent if kind == ROUND]
    assert [sorted(p.states) for p in rounds] == [[]] * 3 + [["sum"]] * 3
    for _, _, parcel in link.sent:
        assert not {"model.path", "data.path", "threads"} & parcel.values["federation"].keys()
        assert str(tmp_path) not in str(parcel.values)

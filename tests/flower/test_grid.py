"""Over Flower's own messages, records, apps and SecAgg+, with a grid in this process."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedalt
from tests.flower.loopback import alike, last_states, own_settings, small, states_of_run

pytest.importorskip("flwr", reason="Flower is not installed: make test-flower has it")

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedalt.errors import RunFailed
from fedalt.flower import client_app, server_app
from fedalt.flower.parcel import GRID, Parcel
from fedalt.flower.up import nested
from fedalt.flower.wire import from_records, to_records
from fedalt.report.events import read_events
from fedalt.store.checkpoint import StoredState, load_latest

CLIENTS = ("ann", "bob", "cyd")


@pytest.fixture(autouse=True)
def _a_task(monkeypatch):
    """Flower numbers the process of a task, and messages want to know."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class InProcess(Grid):
    """Calls the ClientApp where Flower would carry a message; state lives as in a SuperNode."""

    def __init__(self, sites: dict[int, Path]) -> None:
        self.contexts = {
            node: Context(1, node, {"site": str(path)}, RecordDict(), {})
            for node, path in sites.items()
        }
        self.dead: set[tuple[int, str]] = set()
        self.box: dict[str, Message] = {}
        self.posted = 0

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        tickets = []
        for message in messages:
            node, self.posted = message.metadata.dst_node_id, self.posted + 1
            message.metadata.__dict__["_message_id"] = ticket = str(self.posted)
            # What arrives is a copy: SecAgg+ posts one content to all, and its mod takes it apart.
            message = Message(copy.deepcopy(message.content), metadata=message.metadata)
            stage = message.content.config_records.get(RECORD_KEY_CONFIGS, {}).get(Key.STAGE, "")
            if (node, str(stage)) in self.dead:
                reply = Message(Error(8, "ClientApp stopped responding."), reply_to=message)
            else:
                reply = client_app.app(message, self.contexts[node])
            reply.metadata.__dict__["_message_id"] = f"reply to {ticket}"
            self.box[ticket] = reply
            tickets.append(ticket)
        return tickets

    def pull_messages(self, message_ids):
        return [self.box.pop(ticket) for ticket in list(message_ids) if ticket in self.box]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


def play(config, root, clients=CLIENTS, dead=()):
    import yaml

    sites = {}
    for node, client in enumerate(clients, start=11):
        sites[node] = root / f"{client}.yaml"
        own = own_settings(config, client, root / "sites")
        sites[node].write_text(yaml.safe_dump(nested(own)))
    federation = root / "federation.yaml"
    federation.write_text(config.to_yaml())
    grid = InProcess(sites)
    grid.dead |= set(dead)
    settings = {"config": str(federation), "out": str(root / "server"), "sites": len(sites)}
    context = Context(1, 1, {}, RecordDict(), {**settings, "wait": 5.0, "registered": True})
    server_app.main(grid, context)
    return grid


@pytest.mark.parametrize("method", ["fedalt", "fedalt-relay", "fedit"])
def test_the_apps_end_with_the_bits_of_one_process(tiny_config, tmp_path, method):
    config = small(tiny_config, method=method)
    fedalt.Federation(config).run()
    play(config, tmp_path)
    expected = states_of_run(Path(config.out), 3)
    assert alike(last_states(tmp_path / "sites"), expected)


def test_an_error_of_the_apps_is_one_line(tiny_config, tmp_path):
    config = small(tiny_config)
    with pytest.raises(RunFailed, match="1 sites came"):
        play(config, tmp_path, ("ann",))


def secure_config(config, rounds=2):
    federation = replace(config.federation, secure=True, min_clients=3)
    return small(config, rounds=rounds, federation=federation)


def sums_of(root, number):
    saved = load_latest(root / "server")
    handed = {
        client: StoredState(root / "sites" / client / "handed" / f"round-{number:04d}.safetensors")
        for client in saved.record["total"]["own"]
    }
    return saved.state("server", "total").read(), handed


def test_a_secure_sum_is_exactly_what_was_handed_in(tiny_config, tmp_path):
    play(secure_config(tiny_config), tmp_path)
    total, handed = sums_of(tmp_path, 2)
    assert set(handed) == set(CLIENTS)
    for name, t in total.items():
        assert torch.equal(t, sum(update[name] for update in handed.values()))
    assert not (tmp_path / "server" / "checkpoints" / "round-0002" / "counted").exists()


def test_a_secure_row_is_the_plain_one_but_for_the_grid(tiny_config, tmp_path):
    """Each number of n - 1 others is off by half a step at most: so is their mean."""
    config = replace(secure_config(tiny_config, rounds=1))
    play(config, tmp_path)
    plain = replace(config, federation=replace(config.federation, secure=False))
    fedalt.Federation(plain).run()
    one, two = last_states(tmp_path / "sites"), states_of_run(Path(plain.out), 1)
    for client in CLIENTS:
        for name, t in one[client].items():
            off = (t.double() - two[client][name].double()).abs().max()
            ulp = 2.0**-23 * float(t.abs().max())
            assert off <= (GRID / 2 + ulp if "rest_of_world" in name else 0.0), name


def test_the_server_gets_no_update_in_the_clear(tiny_config, tmp_path):
    grid = play(secure_config(tiny_config), tmp_path)
    assert not grid.box
    folder = tmp_path / "server"
    _, handed = sums_of(tmp_path, 2)
    stored = [p for p in folder.rglob("*.safetensors")]
    assert {p.stem for p in stored} == {"total"}
    for path in stored:
        for update in handed.values():
            kept = StoredState(path)
            assert any(not torch.equal(kept[n], update[n]) for n in update)


def test_who_drops_out_after_the_keys_is_left_out_of_the_sum(tiny_config, tmp_path):
    """Four clients, one gone when masked vectors are collected: the others' shares unmask them."""
    from tests.conftest import write_client

    write_client(tmp_path / "data" / "dan", "d", 4)
    clients = (*CLIENTS, "dan")
    config = secure_config(tiny_config, rounds=1)
    play(config, tmp_path, clients, dead=[(14, "collect_masked_vectors")])
    total, handed = sums_of(tmp_path, 1)
    assert set(handed) == set(CLIENTS)
    for name, t in total.items():
        assert torch.equal(t, sum(update[name] for update in handed.values()))
    events = read_events(tmp_path / "server" / "metrics.jsonl")
    assert [e["client"] for e in events if e["event"] == "late"] == ["dan"]


def test_too_few_for_a_secure_sum_end_in_a_thin_round(tiny_config, tmp_path):
    with pytest.raises(RunFailed, match="no site could train"):
        play(secure_config(tiny_config), tmp_path, dead=[(12, "share_keys"), (13, "share_keys")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_records_keep_every_bit(dtype):
    state = {"a": torch.randn(3, 5).to(dtype), "b": torch.tensor([]).to(dtype)}
    values = {"x": 0.1 + 0.2, "n": None, "l": ["é", 1], "big": 2**60}
    got = from_records(to_records(Parcel(values, {"update": state})))
    assert got.values == values
    assert got.states["update"].keys() == state.keys()
    for name, t in state.items():
        assert got.states["update"][name].dtype == dtype
        assert torch.equal(got.states["update"][name], t)

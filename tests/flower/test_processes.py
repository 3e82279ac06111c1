"""SuperLink, SuperNodes and ClientApps as processes on loopback, without any network beyond it.

Slow: Flower starts a process for every message. ``make test-flower`` runs them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedalt
from fedalt.config.schema import Config
from tests.conftest import write_client
from tests.flower.loopback import alike, last_states, small, states_of_run

pytest.importorskip("flwr", reason="Flower is not installed: make test-flower has it")

from fedalt.flower.fab import init_app
from fedalt.flower.up import Loopback, Process, write_sites
from fedalt.report.events import read_events
from fedalt.store.checkpoint import list_checkpoints

CLIENTS = ("ann", "bob", "cyd")
LONG_S = 600.0


@pytest.fixture
def config(tiny_config: Config) -> Config:
    federation = replace(tiny_config.federation, round_timeout=LONG_S)
    return small(tiny_config, rounds=3, federation=federation)


def until(what, seconds: float = LONG_S) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def settings_for(root: Path, sites: int, **more) -> dict[str, object]:
    federation, out = root / "settings" / "federation.yaml", root / "server"
    return {"config": str(federation), "out": str(out), "sites": sites, "registered": False, **more}


def finish(run: Process) -> str:
    run.popen.wait(timeout=LONG_S)
    return run.log.read_text(encoding="utf-8", errors="replace")


def apps_of(site: Path) -> list[int]:
    """The processes of a ClientApp that hold a site's lock open: those that work for it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            open_files = [os.readlink(fd) for fd in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(name.startswith(str(site)) for name in open_files):
            found.append(int(process.name))
    return found


def rounds_done(root: Path) -> int:
    return len(list_checkpoints(root / "server"))


def begun(root: Path, client: str, number: int):
    """Whether a client's process is at work on a round."""
    done = root / "sites" / client / "checkpoints" / f"round-{number - 1:04d}"
    return lambda: done.exists() and bool(apps_of(root / "sites" / client))


def test_kills_of_every_process_end_in_the_bits_of_one_process(config, tmp_path):
    """In one run: a ClientApp and a SuperNode in round 2, then SuperLink, and the same command."""
    fedalt.Federation(config).run()
    expected = states_of_run(Path(config.out), 3)
    root = tmp_path / "up"
    sites = write_sites(config, root)
    init_app(root / "app")
    with Loopback(root) as loopback:
        loopback.connect()
        link = loopback.superlink("--insecure", "--database", str(root / "superlink.db"))
        nodes = {client: loopback.supernode(client, site) for client, site in sites.items()}
        run = loopback.run(root / "app", settings_for(root, 3))
        until(begun(root, "ann", 2))
        for app in apps_of(root / "sites" / "ann"):
            os.kill(app, signal.SIGKILL)
        until(begun(root, "bob", 2))
        nodes["bob"].popen.kill()
        nodes["bob"] = loopback.supernode("bob", sites["bob"])
        until(lambda: (root / "server" / "checkpoints" / "round-0002").exists())
        link.popen.kill()
        link.popen.wait()
        run.stop()
        loopback.superlink("--insecure", "--database", str(root / "superlink.db"))
        log = finish(loopback.run(root / "app", settings_for(root, 3)))
    assert alike(last_states(root / "sites"), expected), log
    events = read_events(root / "server" / "metrics.jsonl")
    trained = {(e["client"], e["round"]) for e in events if e["event"] == "train"}
    assert trained == {(client, number) for client in CLIENTS for number in (1, 2, 3)}


def made(folder: Path, *command: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def certificates(folder: Path) -> None:
    """A CA of one's own, SuperLink's certificate, and a key for each site, as in docs/sites.md."""
    folder.mkdir()
    (folder / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    new = ("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca = ("-x509", "-days", "30", "-subj", "/CN=our own CA", "-keyout", "ca.key", "-out", "ca.crt")
    made(folder, *new, *ca)
    made(folder, *new, "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30")
    which = ("-in", "server.csr", "-extfile", "san", "-out", "server.crt")
    made(folder, "openssl", "x509", "-req", *which, *signed)
    for client in (*CLIENTS, "dan", "fay", "eve"):
        made(folder, "ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", client)


def broken_base(good: str, folder: Path, weight: str, value: float) -> dict[str, object]:
    """A site's setting for a copy of a base in which a weight is one number throughout."""
    model = AutoModelForCausalLM.from_pretrained(good)
    model.get_parameter(weight).data.fill_(value)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(good).save_pretrained(folder)
    return {"path": str(folder)}


def add_site(sites: dict[str, Path], client: str, data: Path, model: dict[str, object]) -> None:
    """One more beside those that a run's data has, with a base of its own."""
    write_client(data / client, client[0], 4)
    settings = yaml.safe_load(sites["ann"].read_text())
    settings["out"] = str(Path(settings["out"]).with_name(client))
    settings["data"] |= {"path": str(data), "clients": [client]}
    settings["model"] |= model
    sites[client] = sites["ann"].with_name(f"{client}.yaml")
    sites[client].write_text(yaml.safe_dump(settings))


def test_over_tls_keys_bases_and_updates_that_do_not_fit_are_turned_away(config, tmp_path):
    """Three sites end with the bits of one process, whatever the others are: eve's key is not
    registered, dan is on another base, and fay's has weights so large that all else is NaN."""
    config = replace(config, rounds=1, method="fedit")
    fedalt.Federation(config).run()
    root, keys, good = tmp_path / "up", tmp_path / "keys", config.model.path
    certificates(keys)
    sites = write_sites(config, root)
    other = broken_base(good, tmp_path / "other", "model.norm.weight", 7.0)
    add_site(sites, "dan", tmp_path / "theirs", other)
    huge = broken_base(good, tmp_path / "huge", "model.layers.0.self_attn.v_proj.weight", 3e38)
    add_site(sites, "fay", tmp_path / "theirs", huge | {"quantization": "fp8"})
    init_app(root / "app")
    files = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
    tls = [w for name, file in files.items() for w in (f"--ssl-{name}", str(keys / file))]
    with Loopback(root) as loopback:
        loopback.connect(f'root-certificates = "{keys / "ca.crt"}"')
        loopback.superlink(*tls, "--enable-supernode-auth")
        for client in sites:
            added = loopback.start(
                f"register-{client}",
                *("flwr", "supernode", "register", str(keys / f"{client}.pub"), "loopback"),
            )
            assert added.popen.wait(timeout=60) == 0, added.log.read_text()

        def node(name: str, client: str) -> Process:
            return loopback.supernode(
                name,
                sites[client],
                *("--root-certificates", str(keys / "ca.crt")),
                *("--auth-supernode-private-key", str(keys / name)),
            )

        eve = node("eve", "ann")
        for client in sites:
            node(client, client)
        run = loopback.run(root / "app", settings_for(root, 5, registered=True))
        log = finish(run)
        assert eve.popen.wait(timeout=60) != 0
    assert alike(last_states(root / "sites"), states_of_run(Path(config.out), 1)), log
    events = read_events(root / "server" / "metrics.jsonl")
    refused = [e["reason"] for e in events if e["event"] == "refuse"]
    assert len(refused) == 2, refused
    assert "client 'dan' is on another base than 'ann'" in refused[0]
    assert "holds NaN" in refused[1]


def test_the_one_command_runs_secure_sums_too(config, tmp_path):
    federation = replace(config.federation, secure=True, min_clients=3)
    config = replace(config, rounds=1, federation=federation)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "fedalt", "flower", "up", str(tmp_path / "up"), "c.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "round 1/1: 3 sites" in done.stderr
    assert done.stdout.count("| ann") == 1
    assert "report: " in done.stdout

"""A whole federation on this machine: SuperLink, a SuperNode a client, the run, and their end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import yaml

from fedalt.config import Config, site_part
from fedalt.data import load_clients
from fedalt.errors import RunFailed
from fedalt.flower.fab import check_flower, init_app
from fedalt.report import write_report
from fedalt.store import RESULTS, write_atomic, writing

OFFLINE = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
HOST = "127.0.0.1"
PATIENCE_S = 60.0
"""For SuperLink to listen."""


@dataclass(frozen=True)
class Process:
    """One of Flower's, with its log."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


class Loopback:
    """Flower's processes of one federation on loopback, under a folder; all stopped at the end."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "flwr"
        # Flower looks for its own commands on the path.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        home = {"FLWR_HOME": str(self.home.absolute()), "PATH": path}
        self.environment = {**os.environ, **OFFLINE, **home}
        self.port = free_port()
        self._stack = ExitStack()

    def start(self, name: str, *command: str, **environment: str) -> Process:
        """One process in the background; its words go to ``logs/NAME.log``."""
        log = self.root / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        file: IO[bytes] = self._stack.enter_context(log.open("ab"))
        popen = subprocess.Popen(
            [str(Path(sys.executable).with_name(command[0])), *command[1:]],
            stdout=file,
            stderr=file,
            env={**self.environment, **environment},
        )
        process = Process(name, popen, log)
        self._stack.callback(process.stop)
        return process

    def superlink(self, *options: str) -> Process:
        """SuperLink, once it listens; ``RunFailed`` where it does not."""
        options = options or ("--insecure",)
        self.home.mkdir(parents=True, exist_ok=True)
        process = self.start(
            "superlink",
            "flower-superlink",
            *options,
            *("--host", HOST, "--port", str(self.port)),
            "--disable-runtime-dependency-installation",
        )
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and process.popen.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex((HOST, self.port)) == 0:
                    return process
            time.sleep(0.2)
        raise RunFailed(f"SuperLink did not start; see {process.log}")

    def supernode(self, client: str, site: Path, *options: str) -> Process:
        """A client's SuperNode."""
        return self.start(
            f"supernode-{client}",
            "flower-supernode",
            *(options or ("--insecure",)),
            *("--superlink", f"{HOST}:{self.port}"),
            *("--host", HOST, "--port", str(free_port())),
            *("--node-config", f'site="{site.absolute()}"'),
        )

    def connect(self, lines: str = "insecure = true") -> None:
        """Let ``flwr`` know SuperLink as ``loopback``."""
        self.home.mkdir(parents=True, exist_ok=True)
        address = f'[superlink.loopback]\naddress = "{HOST}:{self.port}"\n{lines}\n'
        write_atomic(self.home / "config.toml", address)

    def run(self, app: Path, settings: Mapping[str, object]) -> Process:
        """``flwr run``, with its log of the ServerApp."""
        spelled = " ".join(
            f'{k}="{v}"' if isinstance(v, str) else f"{k}={str(v).lower()}"
            for k, v in settings.items()
        )
        return self.start(
            "run", "flwr", "run", str(app), "loopback", "--stream", "--run-config", spelled
        )

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def write_sites(config: Config, root: Path) -> dict[str, Path]:
    """By client of a run's data, its site's settings, written; and the federation's beside them."""
    sites = {}
    for client in load_clients(config.data, config.partition, config.seed):
        own = site_part(config) | {
            "out": str((root / "sites" / client.id).absolute()),
            "data.path": _absolute(config.data.path),
            "data.clients": [client.id],
        }
        sites[client.id] = root / "settings" / f"{client.id}.yaml"
        with writing(sites[client.id]):
            sites[client.id].parent.mkdir(parents=True, exist_ok=True)
        write_atomic(sites[client.id], yaml.safe_dump(nested(own), sort_keys=False))
    write_atomic(root / "settings" / "federation.yaml", config.to_yaml())
    return sites


def nested(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings by dotted key as groups, as YAML has them."""
    whole: dict[str, object] = {}
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        inner = whole.setdefault(group, {}) if group else whole
        assert isinstance(inner, dict)
        inner[name] = value
    return whole


def bring_up(config: Config, root: Path) -> tuple[str, Path]:
    """Run a federation as processes on this machine, every client of its data a site.

    The same again goes on where it was cut short.

    Returns:
        For a terminal, the table of clients; and the path of the report.

    Raises:
        InputError: Flower is not installed, or bad data or settings.
        RunFailed: the run ended without results; the message names the log.
    """
    check_flower()
    from fedalt.flower.server import check_sites

    check_sites(config)
    config = replace(config, out="")
    sites = write_sites(config, root)
    init_app(root / "app")
    server = (root / "server").absolute()
    with Loopback(root) as loopback:
        loopback.connect()
        loopback.superlink()
        for client, site in sites.items():
            loopback.supernode(client, site)
        print(f"SuperLink and {len(sites)} SuperNodes -> {root}/logs", file=sys.stderr, flush=True)
        settings = {
            "config": str((root / "settings" / "federation.yaml").absolute()),
            "out": str(server),
            "sites": len(sites),
            "registered": False,
        }
        run = loopback.run(root / "app", settings)
        _follow(run, (server, root))
    if not (server / RESULTS).is_file():
        raise RunFailed(f"no results in {server}; see {run.log}")
    return write_report(server, f"{config.method} on {len(sites)} sites")


def _follow(run: Process, where: tuple[Path, Path]) -> None:
    """Wait for the run's end, and say each of its rounds."""
    said = 0
    while True:
        ended = run.popen.poll() is not None
        lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines[said:] if ended else lines[said:-1]:
            if "round " in line or "fedalt: " in line or "turned away" in line:
                print(line, file=sys.stderr, flush=True)
        said = max(said, len(lines) if ended else len(lines) - 1)
        if ended:
            return
        time.sleep(0.5)


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path

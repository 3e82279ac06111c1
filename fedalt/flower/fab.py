"""The app that Flower sends to sites: a folder that names this package's two apps."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from fedalt.errors import InputError, not_installed
from fedalt.store import write_atomic, writing
from fedalt_kernels import __version__

WANTED = "1.42"
PYPROJECT = f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedalt-sites"
version = "{__version__}"
description = "FedALT between sites: the code is the installed fedalt, at the server and at sites"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["fedalt_sites"]

[tool.flwr.app]
publisher = "fedalt"

[tool.flwr.app.components]
serverapp = "fedalt_sites.server:app"
clientapp = "fedalt_sites.client:app"

[tool.flwr.app.config]
config = ""        # the federation's settings, a YAML file at the server
out = ""           # the server's run directory
sites = 2          # how many to wait for before the first round
wait = 600         # seconds to wait for them
registered = true  # nodes have registered keys: a client stays with its node
"""
FILES = {
    "pyproject.toml": PYPROJECT,
    "fedalt_sites/__init__.py": '"""FedALT between sites."""\n',
    "fedalt_sites/server.py": '"""The server."""\n\nfrom fedalt.flower.server_app import app\n\n'
    '__all__ = ["app"]\n',
    "fedalt_sites/client.py": '"""A site."""\n\nfrom fedalt.flower.client_app import app\n\n'
    '__all__ = ["app"]\n',
}
COMMANDS = """\
{folder}: the app that the server sends to its sites. Offline, on every machine:
  export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
at the server:
  flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \\
    --enable-supernode-auth --disable-runtime-dependency-installation --database superlink.db
  flwr supernode register ann.pub hospital   # of every site
  flwr run {folder} hospital --stream \\
    --run-config 'config="/abs/federation.yaml" out="/abs/runs/mine" sites=3'
at a site:
  flower-supernode --root-certificates ca.crt --superlink SERVER:8000 \\
    --auth-supernode-private-key ann.key --node-config 'site="/abs/site.yaml"'
docs/sites.md says what is in these files. To see it all on this machine: fedalt flower up DIR"""


def init_app(folder: str | Path) -> str:
    """Write the app's folder, and give the commands that use it.

    Raises:
        InputError: there is something else already, or it cannot be written.
    """
    root = Path(folder)
    for name, content in FILES.items():
        path = root / name
        if path.exists() and path.read_text(encoding="utf-8") != content:
            raise InputError(f"{path}: is there and another one; choose another folder")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    return COMMANDS.format(folder=root)


def check_flower() -> None:
    """``InputError`` unless the Flower that this is made for is installed."""
    try:
        found = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if not found.startswith(f"{WANTED}."):
        raise not_installed(
            f"fedalt flower, made for {WANTED} of it and not {found},", "flwr", "flower"
        )

"""Flower's ServerApp. Its run config: ``config``, ``out``, ``sites``, ``wait``, ``registered``."""

from __future__ import annotations

import sys
from dataclasses import replace

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedalt.config import load_config
from fedalt.errors import InputError, RunFailed
from fedalt.flower.grid import GridLink
from fedalt.flower.server import Server

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that ``config`` says, in the folder ``out``, or go on with it."""
    settings = context.run_config
    try:
        config = replace(load_config(str(settings["config"])), out=str(settings["out"]))
        Server(
            GridLink(grid, context),
            config,
            int(settings["sites"]),
            float(settings["wait"]),
            bool(settings["registered"]),
        ).run()
    except (InputError, RunFailed) as error:
        print(f"fedalt: {error}", file=sys.stderr, flush=True)
        raise

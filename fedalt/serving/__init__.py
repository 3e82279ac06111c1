"""A finished run's clients taken out and used: loaded, scored afresh, exported."""

from fedalt.serving.clients import evaluate_run, load_client
from fedalt.serving.export import export_client, load_export
from fedalt.serving.flat import export_flat
from fedalt.serving.many import load_clients
from fedalt.serving.server import serve

__all__ = [
    "evaluate_run",
    "export_client",
    "export_flat",
    "load_client",
    "load_clients",
    "load_export",
    "serve",
]

"""Where clients and their records come from."""

from fedalt.data.clients import Client, Record, load_clients

__all__ = ["Client", "Record", "load_clients"]

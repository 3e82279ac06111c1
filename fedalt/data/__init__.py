"""Where clients and their records come from."""

from fedalt.data.clients import load_clients
from fedalt.data.images import ImageRecord
from fedalt.data.records import Client, Parts, Record

__all__ = ["Client", "ImageRecord", "Parts", "Record", "load_clients"]

"""The federation's clients and their records, wherever they come from."""

from fedalt.data.chats import Chat
from fedalt.data.clients import load_clients
from fedalt.data.images import ImageExample, ImageRecord, broken_images, pixels
from fedalt.data.packing import pack
from fedalt.data.records import Client, Parts, Record
from fedalt.data.sources import is_on_hub
from fedalt.data.tokens import IGNORED, Batch, Example, collate, encode
from fedalt.data.turns import is_special

__all__ = [
    "IGNORED",
    "Batch",
    "Chat",
    "Client",
    "Example",
    "ImageExample",
    "ImageRecord",
    "Parts",
    "Record",
    "broken_images",
    "collate",
    "encode",
    "is_on_hub",
    "is_special",
    "load_clients",
    "pack",
    "pixels",
]

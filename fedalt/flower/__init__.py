"""The federation across machines, on Flower; nothing of Flower is imported unless asked."""

from fedalt.flower.fab import init_app
from fedalt.flower.up import bring_up

__all__ = ["bring_up", "init_app"]

"""What a run will need, told before its weights are loaded."""

from fedalt.memory.memory import foretell

__all__ = ["foretell"]

"""Packages that a run asks for by its settings only."""

from __future__ import annotations

import logging
from types import ModuleType

from fedalt.errors import not_installed


def bitsandbytes(setting: str) -> ModuleType:
    """The package; ``InputError`` where ``setting`` wants it and it is not installed."""
    # On a CPU it names, at its first import, a faster kernel for an inference that is not ours.
    noisy = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        import accelerate  # noqa: F401  transformers quantizes with it
        import bitsandbytes
    except ImportError:
        raise not_installed(setting, "bitsandbytes", "quantized") from None
    finally:
        noisy.setLevel(level)
    return bitsandbytes

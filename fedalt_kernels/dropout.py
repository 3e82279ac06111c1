"""Counter-based dropout: the mask is a function of (seed, row, column) and of nothing else.

The generator is Philox4x64-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011).
One call makes 256 bits, which serve 32 columns with a byte each::

    block(m, q) = Philox4x64-10(counter = m * ceil(K / 32) + q, key = (seed, 0))
    byte(m, k)  = byte k mod 32 of block(m, k // 32), words and bytes little-endian
    kept(m, k)  = byte(m, k) >= t

so the mask depends neither on the device, nor on how rows and columns are tiled, and the backward
makes it again from the seed.  ``t = drop_threshold(p)`` rounds p to a multiple of 1/256; survivors
are scaled by ``keep_scale(t) = 1 / (1 - t / 256)``, so the expectation is exact.

The bytes are made on the CPU, by the generator numpy has in C.
"""

import sys
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

COLUMNS_A_CALL = 32
WORDS_A_CALL = 4
SEED_LIMIT = 2**63


def drop_threshold(p: float) -> int:
    """Bytes below this are dropped: 0 for no dropout, else 256 p rounded, within 1 to 255."""
    return min(max(1, round(256 * p)), 255) if p > 0 else 0


def keep_scale(threshold: int) -> float:
    """The factor that keeps the expectation: one over the probability of being kept."""
    return 256 / (256 - threshold)


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's default generator of the device: int64 []."""
    return torch.randint(SEED_LIMIT - 1, (), device=device)


class _Philox(threading.local):
    """A thread's generator and its state, which is set ten times faster than one is made."""

    def __init__(self) -> None:
        self.generator = np.random.Philox()
        self.state: Any = dict(self.generator.state)


_philox = _Philox()


def mask_bytes(seed: int, first: int, rows: int, columns: int) -> np.ndarray:
    """The random bytes of some rows of a matrix, uint8 [rows, columns], from row `first` on.

    Raises:
        ValueError: the seed is not in [0, 2**63).
    """
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    calls_a_row = -(-columns // COLUMNS_A_CALL)
    generator, state = _philox.generator, _philox.state
    # numpy increments the counter before it generates.
    before = (first * calls_a_row - 1) % 2**256
    state["state"]["counter"] = [before >> shift & 2**64 - 1 for shift in (0, 64, 128, 192)]
    state["state"]["key"] = seed, 0
    generator.state = state
    words = generator.random_raw(rows * calls_a_row * WORDS_A_CALL)
    if sys.byteorder == "big":
        words = words.byteswap()
    return words.view(np.uint8).reshape(rows, calls_a_row * COLUMNS_A_CALL)[:, :columns]


def keep_rows(seed: int, threshold: int, first: int, rows: int, columns: int) -> Tensor:
    """Which elements of those rows survive: uint8 [rows, columns] of 0 and 1, on the CPU."""
    return torch.from_numpy((mask_bytes(seed, first, rows, columns) >= threshold).view(np.uint8))


def keep_mask(seed: int, rows: int, columns: int, threshold: int) -> Tensor:
    """Which elements survive: bool [rows, columns] on the CPU."""
    return keep_rows(seed, threshold, 0, rows, columns).view(torch.bool)

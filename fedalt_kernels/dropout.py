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
from collections.abc import Iterator

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


def mask_bytes(seed: int, rows: int, columns: int, block_rows: int) -> Iterator[Tensor]:
    """The random bytes of a [rows, columns] matrix, in blocks of at most `block_rows` rows.

    Yields:
        uint8 [block's rows, columns] on the CPU, a view of rows padded to a multiple of 32.

    Raises:
        ValueError: the seed is not in [0, 2**63).
    """
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    calls_a_row = -(-columns // COLUMNS_A_CALL)
    # numpy increments the counter before it generates, so this begins at counter 0.
    generator = np.random.Philox(counter=2**256 - 1, key=seed)
    for first in range(0, rows, block_rows):
        height = min(block_rows, rows - first)
        words = generator.random_raw(height * calls_a_row * WORDS_A_CALL)
        if sys.byteorder == "big":
            words = words.byteswap()
        padded = torch.from_numpy(words.view(np.uint8)).view(height, calls_a_row * COLUMNS_A_CALL)
        yield padded[:, :columns]


def keep_mask(seed: int, rows: int, columns: int, threshold: int) -> Tensor:
    """Which elements survive: bool [rows, columns] on the CPU."""
    blocks = [torch.empty(0, columns, dtype=torch.uint8)]
    blocks += mask_bytes(seed, rows, columns, max(1, rows))
    return torch.cat(blocks) >= threshold

"""The dropout mask as bits, for a backward that needs it twice.

The mask is made in the forward inside `strips.project_rows`, and not kept.  In the backward the
pass over x and the tiles of dX both want it; a tile of dX that made it would do so in the layout of
its accumulator, several threads for each bit.  Here every call of the generator is one thread's.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .primitives import MASK_GROUP

BLOCK = 256


@triton.jit
def mask_bits(seed, counter, threshold):
    """The words of these calls of the generator: bit j tells whether its byte j is kept."""
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(seed, counter, zero, zero, zero)
    bits = tl.zeros(counter.shape, tl.int32)
    for octet in tl.static_range(8):
        bits |= (((w0 >> 8 * octet) & 255).to(tl.int32) >= threshold).to(tl.int32) << octet
        bits |= (((w1 >> 8 * octet) & 255).to(tl.int32) >= threshold).to(tl.int32) << 8 + octet
        bits |= (((w2 >> 8 * octet) & 255).to(tl.int32) >= threshold).to(tl.int32) << 16 + octet
        bits |= (((w3 >> 8 * octet) & 255).to(tl.int32) >= threshold).to(tl.int32) << 24 + octet
    return bits


@triton.jit(do_not_specialize=["length"])
def _mask_words(seed, words, threshold, length, BLOCK: tl.constexpr):
    o_word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = mask_bits(tl.load(seed), o_word.to(tl.uint64), threshold)
    tl.store(words + o_word, bits, mask=o_word < length)


def masking(rows: int, columns: int, threshold: int) -> Callable[[Tensor], Tensor]:
    """Plans, of a seed, int32 [rows, ⌈columns / 32⌉]: bit j of word (m, q) tells whether
    (m, 32 q + j) is kept."""
    calls = triton.cdiv(columns, MASK_GROUP.value)
    launch = Launch(
        _mask_words,
        (triton.cdiv(rows * calls, BLOCK),),
        ("seed", "words"),
        threshold=threshold,
        length=rows * calls,
        BLOCK=BLOCK,
    )

    def run(seed: Tensor) -> Tensor:
        words = torch.empty(rows, calls, dtype=torch.int32, device=seed.device)
        launch(seed, words)
        return words

    return run

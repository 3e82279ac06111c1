"""The kernels' dropout mask is the CPU path's, bit for bit, however it is cut into blocks."""

import pytest
import torch
import triton
import triton.language as tl

from fedalt_kernels.dropout import keep_mask
from fedalt_kernels.triton.dropout import masking
from fedalt_kernels.triton.primitives import keep_block, kept_bits, store_block

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _keep(
    seed,
    words,
    mask,
    threshold,
    M,
    K: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
):
    row, column = tl.program_id(0) * HEIGHT, tl.program_id(1) * WIDTH
    if BITS:
        keep = kept_bits(words, row, column, M, K, HEIGHT, WIDTH)
    else:
        keep = keep_block(tl.load(seed), threshold, row, column, K, HEIGHT, WIDTH)
    block = keep.to(tl.float32)
    store_block(mask, block, row, column, M, K, K, HEIGHT, WIDTH, False, "ieee")


@pytest.mark.parametrize("block", [(16, 32), (32, 64), (64, 128), (8, 256)], ids=str)
@pytest.mark.parametrize("seed", [0, 20, 2**32 + 7, 2**63 - 1])
@pytest.mark.parametrize("shape", [(1, 1), (37, 83), (64, 256)], ids=str)
@pytest.mark.parametrize("bits", [False, True])
def test_mask(shape: tuple[int, int], seed: int, block: tuple[int, int], bits: bool) -> None:
    """As tiles make it themselves, and as they read it from the words made beforehand."""
    m, k = shape
    held = torch.tensor(seed, device=DEVICE)
    mask = torch.full(shape, float("nan"), device=DEVICE)
    _keep[(triton.cdiv(m, block[0]), triton.cdiv(k, block[1]))](
        seed=held,
        words=masking(m, k, 77)(held) if bits else None,
        mask=mask,
        threshold=77,
        M=m,
        K=k,
        HEIGHT=block[0],
        WIDTH=block[1],
        BITS=bits,
    )
    assert torch.equal(mask.cpu(), keep_mask(seed, m, k, 77).float())

"""The kernels' dropout mask is the CPU path's, bit for bit, however it is cut into blocks."""

import pytest
import torch
import triton
import triton.language as tl

from fedalt_kernels.dropout import keep_mask
from fedalt_kernels.triton.primitives import keep_block, store_block

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _keep(seed, mask, threshold, M, K: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.program_id(0) * HEIGHT, tl.program_id(1) * WIDTH
    keep = keep_block(tl.load(seed), threshold, row, column, K, HEIGHT, WIDTH)
    block = keep.to(tl.float32)
    store_block(mask, block, row, column, M, K, K, HEIGHT, WIDTH, False, "ieee")


@pytest.mark.parametrize("block", [(16, 32), (32, 64), (64, 128), (8, 256)], ids=str)
@pytest.mark.parametrize("seed", [0, 20, 2**32 + 7, 2**63 - 1])
@pytest.mark.parametrize("shape", [(1, 1), (37, 83), (64, 256)], ids=str)
def test_mask(shape: tuple[int, int], seed: int, block: tuple[int, int]) -> None:
    m, k = shape
    mask = torch.full(shape, float("nan"), device=DEVICE)
    _keep[(triton.cdiv(m, block[0]), triton.cdiv(k, block[1]))](
        seed=torch.tensor(seed, device=DEVICE),
        mask=mask,
        threshold=77,
        M=m,
        K=k,
        HEIGHT=block[0],
        WIDTH=block[1],
    )
    assert torch.equal(mask.cpu(), keep_mask(seed, m, k, 77).float())

"""The mask: its bits by an independent generator, its statistics, and where it is applied."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fedalt_kernels import dropout, mixed_lora_linear
from fedalt_kernels.reference import reference

from .cases import SCALING, SEED, Case, build
from .philox import MASK, philox4x64

KNOWN_ANSWERS = [  # Random123's kat_vectors: counter, key, words
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (MASK,) * 4,
        (MASK,) * 2,
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_plain_philox_has_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    assert philox4x64(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 7, 2**63 - 1])
@pytest.mark.parametrize("columns", [1, 17, 32, 70])
def test_bytes_follow_the_documented_layout(columns: int, seed: int) -> None:
    rows = 5
    got = dropout.mask_bytes(seed, 0, rows, columns)
    calls = -(-columns // 32)
    for m in range(rows):
        for k in range(columns):
            words = philox4x64((m * calls + k // 32, 0, 0, 0), (seed, 0))
            block = b"".join(word.to_bytes(8, "little") for word in words)
            assert got[m, k] == block[k % 32]


@pytest.mark.parametrize("block_rows", [1, 3, 64])
def test_blocks_make_the_same_bytes(block_rows: int) -> None:
    whole = dropout.mask_bytes(SEED, 0, 64, 70)
    for first in range(0, 64, block_rows):
        rows = min(block_rows, 64 - first)
        got = dropout.mask_bytes(SEED, first, rows, 70)
        assert np.array_equal(got, whole[first : first + rows])


def test_threads_do_not_disturb_each_others_bytes() -> None:
    """Each has a generator of its own, which lasts as long as the thread."""
    seeds = [SEED, SEED + 1] * 20
    expected = {seed: dropout.mask_bytes(seed, 3, 200, 300) for seed in seeds}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: dropout.mask_bytes(seed, 3, 200, 300), seeds))
    for seed, got in zip(seeds, found, strict=True):
        assert np.array_equal(got, expected[seed])


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*63\)"):
        dropout.mask_bytes(seed, 0, 1, 1)


@pytest.mark.parametrize(
    ("p", "threshold"), [(0, 0), (1e-9, 1), (0.05, 13), (0.5, 128), (0.999, 255)]
)
def test_threshold(p: float, threshold: int) -> None:
    assert dropout.drop_threshold(p) == threshold


@pytest.mark.parametrize("threshold", [1, 13, 128, 255])
def test_keep_rate_over_rows_columns_and_all(threshold: int) -> None:
    """Within 5 standard deviations of the binomial, for each row, each column and the whole."""
    keep = dropout.keep_mask(SEED, 1000, 200, threshold).double()
    rate = 1 - threshold / 256
    for kept in (keep.mean(0), keep.mean(1), keep.mean()):
        trials = keep.numel() / kept.numel()
        deviation = math.sqrt(rate * (1 - rate) / trials)
        assert (kept - rate).abs().max() <= 5 * deviation + 1 / trials


def test_masks_of_two_seeds_are_unrelated() -> None:
    one, two = (dropout.keep_mask(seed, 500, 200, 128) for seed in (1, 2))
    assert abs((one == two).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(100_000)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_forward_and_backward_use_the_documented_mask(impl: str) -> None:
    """Identity factors over a zero base show the mask itself, forward and backward."""
    m, k, threshold = 6, 40, dropout.drop_threshold(0.3)
    x = torch.ones(m, k, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(k, dtype=torch.float64)
    y = mixed_lora_linear(
        x,
        torch.zeros_like(eye),
        None,
        [(eye, eye)],
        None,
        scaling=1.0,
        dropout_p=0.3,
        seed=9,
        impl=impl,
    )
    expected = dropout.keep_mask(9, m, k, threshold).double() * dropout.keep_scale(threshold)
    assert torch.allclose(y, expected)
    y.sum().backward()
    assert torch.allclose(x.grad, expected)


def test_expectation_is_exact() -> None:
    """The mean over every threshold byte of the kept, scaled element is the element itself."""
    for p in (0.004, 0.05, 0.5, 0.9):
        threshold = dropout.drop_threshold(p)
        assert (256 - threshold) / 256 * dropout.keep_scale(threshold) == pytest.approx(
            1, rel=1e-15
        )


def test_mixer_sees_x_undropped() -> None:
    inputs = build(Case(gate="softmax"))
    y = [
        function(
            inputs.x,
            inputs.weight,
            None,
            inputs.adapters,
            inputs.mixer,
            scaling=SCALING,
            dropout_p=0.9,
            seed=SEED,
        )
        for function in (mixed_lora_linear, reference)
    ]
    assert torch.allclose(*y, rtol=1e-12)


def test_seed_forms_agree_and_none_follows_the_default_generator() -> None:
    inputs = build(Case())

    def call(seed: int | torch.Tensor | None) -> torch.Tensor:
        return mixed_lora_linear(
            inputs.x,
            inputs.weight,
            None,
            inputs.adapters,
            inputs.mixer,
            scaling=SCALING,
            dropout_p=0.5,
            seed=seed,
        )

    assert torch.equal(call(5), call(torch.tensor(5)))
    torch.manual_seed(1)
    first, second = call(None), call(None)
    torch.manual_seed(1)
    assert torch.equal(call(None), first)
    assert not torch.equal(first, second)

"""Products of factors: cut back exactly, alike for equal products, whatever their rank."""

import numpy as np
import pytest
import torch

from fedalt.methods import products
from fedalt.methods.fedalt import get_method
from fedalt.methods.products import factored, layers_of, similarity, stacked

from .method_cases import A, B, integers, round_of, toys, truncated

N, K = 7, 5


def draw(rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(N, rank, generator=generator, dtype=torch.float64)
    return b, torch.randn(rank, K, generator=generator, dtype=torch.float64)


def rounding(b, a):
    """What a backward stable QR and SVD in fp64 may lose: ``c (N + K + R) u ‖B‖ ‖A‖``, c = 8."""
    return 8 * (N + K + b.shape[1]) * 2.0**-53 * float(b.norm() * a.norm())


def test_flexlora_factors_a_mean_product_once_a_rank(monkeypatch):
    """Two layers, three clients and a newcomer, two ranks."""
    calls, factor = [], products.factored
    monkeypatch.setattr(products, "factored", lambda *a, rank: calls.append(1) or factor(*a, rank))
    lower = round_of("flexlora", toys(), ranks={"bob": 1})
    install = get_method("flexlora").combine(lower).install
    ann, bob, cyd, newcomer = (install(client) for client in ("ann", "bob", "cyd", ""))
    assert len(calls) == 2 * 2
    for name in ann:
        assert torch.equal(ann[name], cyd[name])
        assert torch.equal(ann[name], newcomer[name])
    assert (ann[f"q.{A}"].shape, bob[f"q.{A}"].shape) == ((2, 3), (1, 3))


def test_layers_are_named_by_their_adapters():
    names = ["x.q.individual.a", "x.q.individual.b", "x.v.individual.b", "lm_head.weight"]
    assert layers_of(dict.fromkeys(names, torch.zeros(1))) == ["x.q.individual"]


def test_stacked_factors_multiply_to_the_weighted_sum_of_products():
    """Of ranks 1 and 2, in whole numbers: exact."""
    updates = [
        {f"q.{A}": integers(rank, rank, K), f"q.{B}": integers(rank + 5, N, rank)}
        for rank in (1, 2)
    ]
    b, a = stacked(updates, [0.5, -2.0], "q.individual")
    assert (b.shape, a.shape, b.dtype) == ((N, 3), (3, K), torch.float64)
    one, two = (u[f"q.{B}"].double() @ u[f"q.{A}"].double() for u in updates)
    assert torch.equal(b @ a, 0.5 * one - 2 * two)


@pytest.mark.parametrize("columns", [1, 3, 5, 9])
@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_factored_is_the_best_product_of_its_rank(rank, columns):
    """Up to, and above, the number of columns and min(N, K): what is spare is zeros in B."""
    b, a = draw(columns)
    up, down = factored(b, a, rank)
    assert (up.shape, down.shape) == ((N, rank), (rank, K))
    wanted = torch.from_numpy(truncated((b @ a).numpy(), rank))
    assert (up @ down - wanted).norm() <= rounding(b, a)
    spare = min(columns, N, K)
    assert not up[:, spare:].any()
    kept = min(rank, spare)
    one = torch.eye(kept, dtype=torch.float64)
    assert (down[:kept] @ down[:kept].mT - one).norm() <= 8 * K * rank * 2.0**-53  # rows of V


def test_factored_by_hand():
    """``diag(3, -5)`` in two of the corners: the larger value is kept, its row of A positive."""
    b = torch.zeros(N, 2, dtype=torch.float64)
    a = torch.zeros(2, K, dtype=torch.float64)
    b[0, 0], b[1, 1], a[0, 0], a[1, 4] = 3, 5, 1, -1
    up, down = factored(b, a, 1)
    assert down.tolist() == [pytest.approx([0, 0, 0, 0, 1], abs=2.0**-50)]
    assert up.flatten().tolist() == pytest.approx([0, -5, 0, 0, 0, 0, 0], abs=2.0**-48)


def test_equal_products_have_equal_factors():
    """However they are factored: with signs turned, columns split and turned about."""
    b, a = draw(3)
    first = factored(b, a, 3)
    turn = torch.linalg.qr(draw(3, seed=1)[0][:3, :3])[0]
    gap = torch.linalg.svdvals(b @ a)[:3].diff().abs().min()
    for other_b, other_a in (
        (-b, -a),
        (b @ turn, turn.mT @ a),
        (torch.cat([b / 4, b * 0.75], 1), torch.cat([a, a])),
    ):
        second = factored(other_b, other_a, 3)
        for one, two in zip(first, second, strict=True):  # Davis and Kahan: rounding over the gap
            allowed = 4 * rounding(other_b, other_a) / gap * max(1.0, float(b.norm() * a.norm()))
            assert (one - two).norm() <= allowed
    for row in first[1]:
        assert row[row.abs().argmax()] > 0


@pytest.mark.parametrize("rank", [2, 6])
def test_zero_products_have_a_zero_b(rank):
    b, a = draw(2)
    for zero_b, zero_a in ((b * 0, a), (b, a * 0), (torch.cat([b, -b], 1), torch.cat([a, a]))):
        up, down = factored(zero_b, zero_a, rank)
        assert not up.any()
        assert down.isfinite().all()


def test_rank_deficient_factors_keep_their_product_and_nothing_else():
    """Four columns of rank 1."""
    b, a = draw(1)
    wide_b, wide_a = b.repeat(1, 4), torch.cat([a, 2 * a, -a, a * 0])
    up, down = factored(wide_b, wide_a, 3)
    assert (up @ down - 2 * (b @ a)).norm() <= rounding(wide_b, wide_a)
    assert not up[:, 1:].any()


def test_similarity_by_hand():
    """(3, 4) and (4, 3) over two layers: 24 / 25; with its negative -1, with zeros nothing."""
    vectors = [(3.0, 4.0), (4.0, 3.0), (-3.0, -4.0), (0.0, 0.0)]
    updates = [
        {
            f"q.{B}": torch.tensor([[x]]),
            f"v.{B}": torch.tensor([[y]]),
            f"q.{A}": torch.ones(1, 1) * i,
        }
        for i, (x, y) in enumerate(vectors)
    ]
    wanted = [[1, 0.96, -1, 0], [0.96, 1, -0.96, 0], [-1, -0.96, 1, 0], [0, 0, 0, 0]]
    assert similarity(updates).numpy() == pytest.approx(np.array(wanted), abs=2.0**-51)
    of_a = similarity(updates, ".a").tolist()
    assert (of_a[0], of_a[1]) == ([0, 0, 0, 0], [0, 1, 1, 1])

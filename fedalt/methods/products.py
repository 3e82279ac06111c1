"""Means of products B A, and a product cut back to one pair of factors.

A mean of A and a mean of B do not multiply to the mean of B A; methods that want that mean go
through here. All in fp64, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Update = Mapping[str, Tensor]


def layers_of(update: Update) -> list[str]:
    """The names up to ``.a`` and ``.b`` of every adapter in an update."""
    return [name[:-2] for name in update if name.endswith(".a")]


def stacked(
    updates: Sequence[Update], weights: Sequence[float], layer: str
) -> tuple[Tensor, Tensor]:
    """Factors of ``Σ_k w_k B_k A_k``: B [N, Σ r_k] with the weights in it, A [Σ r_k, K]."""
    b = torch.cat(
        [w * u[f"{layer}.b"].double() for u, w in zip(updates, weights, strict=True)], dim=1
    )
    return b, torch.cat([update[f"{layer}.a"].double() for update in updates])


def factored(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of ``b a`` of rank ``rank``: ``B = U Σ`` [N, r], ``A = Vᵀ`` [r, K].

    The SVD is taken of the small core between two QR factors, so it costs O((N + K) R²) for R
    columns of ``b``. Signs are fixed by the largest entry of each row of A, so that equal products
    have equal factors. Where the product has a lower rank the rest of B is zeros.
    """
    left, left_core = torch.linalg.qr(b)
    right, right_core = torch.linalg.qr(a.mT)
    u, s, v = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    rounding = torch.finfo(s.dtype).eps * max(len(b), a.shape[1])
    s = s.where(s > rounding * left_core.norm() * right_core.norm(), 0)
    kept = min(rank, s.numel())
    up, down = left @ u[:, :kept] * s[:kept], v[:kept] @ right.mT
    sign = down.gather(1, down.abs().argmax(1, keepdim=True)).sign()
    up, down = up * sign.mT, down * sign
    pad = rank - kept
    return torch.nn.functional.pad(up, (0, pad)), torch.nn.functional.pad(down, (0, 0, 0, pad))


def similarity(updates: Sequence[Update], part: str = ".b") -> Tensor:
    """Cosine [n, n] between the clients' factors of one kind, all layers together."""
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in updates[0]:
        if name.endswith(part):
            rows = torch.stack([update[name].double().flatten() for update in updates])
            gram += rows @ rows.mT
    norms = gram.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return gram / norms / norms[:, None]

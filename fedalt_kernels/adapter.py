"""What every other module passes around: adapters, all beside the base product, rows of x."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from torch import Tensor

Factors = list[Tensor] | tuple[Tensor, ...]


class Adapter(NamedTuple):
    """One low-rank adapter: it adds ``scaling · gate · B (A x)`` to the base projection."""

    a: Tensor  # [r, K], down-projection
    b: Tensor  # [N, r], up-projection


class Branches(NamedTuple):
    """Everything beside the base product; tensors keep the dtype of their parameters."""

    downs: Factors  # E of [r_e, K]
    ups: Factors  # E of [N, r_e]
    mixer: Tensor | None  # [E, K]; None: `weights` gate
    weights: Sequence[float] | None  # E fixed gates; None: all 1
    scaling: float  # alpha / r, times the dropout's keep scale
    threshold: int  # bytes below it are dropped; 0: no dropout
    seed: Tensor | None  # int64 [], None without dropout
    schedule: str | None = None  # of the Triton implementation; None: it chooses
    kind: Hashable = None  # of the call, in place of all that plans depend on here and of the base


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] whose rows are contiguous and do not overlap; a copy only if need be."""
    rows = x.reshape(-1, x.shape[-1])
    tidy = rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]
    return rows if tidy else rows.contiguous()

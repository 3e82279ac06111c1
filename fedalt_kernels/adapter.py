"""The pair of factors every other module passes around."""

from typing import NamedTuple

from torch import Tensor


class Adapter(NamedTuple):
    """One low-rank adapter: it adds ``scaling · gate · B (A x)`` to the base projection."""

    a: Tensor  # [r, K], down-projection
    b: Tensor  # [N, r], up-projection

"""How far a result may be from float64: as far as eager PyTorch is, times a small factor:
2 for the largest error, 1.5 for the RMS error.

Both are computed from the same inputs in the same dtype.  A floor covers results where eager is
exact by luck: the result's own rounding, u, and the random walk of a float32 accumulation over L
products, u32 √L, relative to the largest value (and to the RMS for the RMS error).
"""

import torch
from torch import Tensor

FACTORS = {"max": 2.0, "rms": 1.5}
UNIT32 = torch.finfo(torch.float32).eps / 2


def floor(dtype: torch.dtype, length: int) -> float:
    """The error, relative to the result's scale, that no implementation can promise to beat."""
    return torch.finfo(dtype).eps / 2 + UNIT32 * length**0.5


def excess(got: Tensor, eager: Tensor, truth: Tensor, length: int) -> dict[str, float]:
    """Error over budget, for the largest error and the RMS error; at most 1 where it is kept."""
    unavoidable = floor(got.dtype, length)
    over = {}
    for name, size in (("max", _max), ("rms", _rms)):
        allowed = FACTORS[name] * size(eager.double() - truth) + unavoidable * size(truth)
        over[name] = size(got.double() - truth) / allowed if allowed else size(got - truth)
    return over


def assert_within_budget(
    got: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], length: int
) -> None:
    """`got`, `eager` and `truth` by name, from `cases.run`; `length` of the longest contraction."""
    assert got.keys() == truth.keys()
    for name, value in got.items():
        assert torch.isfinite(value).all(), name
        assert value.dtype == eager[name].dtype, name
        for kind, share in excess(value, eager[name], truth[name], length).items():
            assert share <= 1, f"{name}: {kind} error is {share:.2f} times its budget"


def _max(values: Tensor) -> float:
    return values.abs().max().item()


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()

"""An implementation against the float64 specification, within eager PyTorch's own error."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedalt_kernels import mixed_lora_linear
from fedalt_kernels.reference import reference

from .budget import assert_within_budget
from .cases import Case, build, run

POOLED_ROWS = 64


def check(
    case: Case,
    function: Callable[..., Tensor] = mixed_lora_linear,
    least_draws: int = 8,
    device: str = "cpu",
) -> None:
    """Pools draws: of a few rows, eager's error is luck, being a handful of roundings."""
    draws = [build(case, seed, device) for seed in range(max(least_draws, POOLED_ROWS // case.m))]
    truth = pool([run(reference, inputs.in_float64(), case.dropout) for inputs in draws])
    eager = pool([run(reference, inputs, case.dropout) for inputs in draws])
    got = pool([run(function, inputs, case.dropout) for inputs in draws])
    assert_within_budget(got, eager, truth, length=max(case.m, case.n, case.k))


def pool(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results of several draws, by name."""
    return {name: torch.stack([each[name] for each in results]) for name in results[0]}

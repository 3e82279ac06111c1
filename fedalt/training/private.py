"""DP-SGD: gradients of single records clipped, summed and noised, and what they cost.

Abadi et al. 2016: a step's gradient is ``(Σ_i g_i min(1, C / |g_i|) + σ C z) / B``, with g_i the
gradient of record i over all that is trained, z standard normal, and B the batch's expected size.
A record is in a step's batch with probability ``q = B / N``, whatever the others are.
"""

from __future__ import annotations

import importlib.util
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedalt.config import PrivacyConfig
from fedalt.errors import InputError, not_installed
from fedalt.model import sum_dtype
from fedalt.training.micro import Loss


class PrivateSteps:
    """The steps of one client's turn: batches drawn and noise made from the system's entropy.

    Their generator is seeded with 256 bits that nobody keeps, so no run is the same as another; a
    seed that is known would let who knows it take the noise off.
    """

    def __init__(
        self, examples: Sequence[Any], batch_size: int, privacy: PrivacyConfig, loss: Loss
    ) -> None:
        self._examples, self._privacy, self._loss = examples, privacy, loss
        self._rate = sampling_rate(len(examples), batch_size)
        self._random = np.random.Generator(np.random.PCG64DXSM(secrets.randbits(256)))

    def batch(self) -> list[Any]:
        """Every record with probability ``q``; at times nobody."""
        drawn = self._random.random(len(self._examples)) < self._rate
        return [self._examples[i] for i in np.flatnonzero(drawn).tolist()]

    def gradient(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        batch: Sequence[Any],
        on_record: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Leave the step's gradient in ``trained``.

        Args:
            model: its gradients are empty.
            trained: by name, all that is trained.
            batch: of records; each goes through the model alone.
            on_record: called after every record's backward.

        Returns:
            The mean loss of the batch's records, which is not private; zero of none.
        """
        clip = self._privacy.record_clip
        assert clip is not None
        device = next(iter(trained.values())).device
        precise = sum_dtype(device)
        sums = {name: torch.zeros_like(p, dtype=precise) for name, p in trained.items()}
        total = torch.zeros((), dtype=precise, device=device)
        for record in batch:
            one = self._loss(model, [record])
            one.backward()
            total += one.detach()
            on_record()
            add_clipped(sums, {name: p.grad for name, p in trained.items()}, clip)
            model.zero_grad(set_to_none=True)
        spread = self._privacy.noise * clip
        expected = self._rate * len(self._examples)
        for name, parameter in trained.items():
            noise = torch.from_numpy(self._random.standard_normal(parameter.shape))
            noised = sums[name] + spread * noise.to(device, precise)
            parameter.grad = (noised / expected).to(parameter.dtype)
        return total / max(len(batch), 1)


def add_clipped(
    sums: Mapping[str, Tensor], gradient: Mapping[str, Tensor | None], clip: float
) -> None:
    """Add one record's gradient to the sums, scaled down to norm ``clip``.

    One that is not finite is left out, so that no record can reveal itself by spoiling the sum.
    """
    there = {name: g.to(sums[name].dtype) for name, g in gradient.items() if g is not None}
    norm = math.sqrt(sum(float(g.square().sum()) for g in there.values()))
    if not math.isfinite(norm):
        return
    scale = min(1.0, clip / norm) if norm else 1.0
    for name, g in there.items():
        sums[name].add_(g, alpha=scale)


def sampling_rate(examples: int, batch_size: int) -> float:
    """``q``: the chance of a record to be in a step's batch."""
    return min(1.0, batch_size / examples)


@lru_cache(maxsize=4096)
def epsilon_after(steps: int, rate: float, noise: float, delta: float) -> float:
    """The epsilon of ``steps`` steps, by Rényi accounting of the sampled Gaussian mechanism.

    Neighbours are data sets that differ by one record more or less.

    Raises:
        InputError: dp-accounting is not installed.
    """
    if not steps:
        return 0.0
    check_accountant()
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()
    gaussian = dp_accounting.GaussianDpEvent(noise)
    event = gaussian if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


def check_accountant() -> None:
    """``InputError`` without dp-accounting: nothing is called private without a number."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise not_installed("privacy.record_clip", "dp-accounting", "privacy")


def check_privacy(privacy: PrivacyConfig, examples: int, client: str) -> None:
    """Refuses, with ``InputError``, privacy that cannot be accounted, or says nothing."""
    if not privacy.on:
        return
    check_accountant()
    if privacy.delta >= 1 / examples:
        raise InputError(
            f"privacy.delta: {privacy.delta:g} lets one of {client}'s {examples} records be told "
            f"whole; set it below {1 / examples:.2g}"
        )

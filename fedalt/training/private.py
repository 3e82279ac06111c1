"""DP-SGD: gradients of single records clipped, summed and noised, and what they cost.

Abadi et al. 2016: a step's gradient is ``(Σ_i g_i min(1, C / |g_i|) + σ C z) / B``, with g_i the
gradient of record i over all that is trained, z standard normal, and B the batch's expected size.
A record is in a step's batch with probability ``q = B / N``, whatever the others are.
"""

from __future__ import annotations

import importlib.util
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedalt.config import PrivacyConfig
from fedalt.errors import InputError, not_installed
from fedalt.model import HEAD, HiddenRows, State, keeps_rows_apart, part_of, sum_dtype
from fedalt.training.micro import Count, Loss, free_memory, out_of_memory
from fedalt.training.records import record_gradients


class PrivateSteps:
    """The steps of one client's turn: batches drawn and noise made from the system's entropy.

    Their generator is seeded with 256 bits that nobody keeps, so no run is the same as another; a
    seed that is known would let who knows it take the noise off.

    Args:
        examples: the client's train records.
        batch_size: B, the expected one.
        loss: the mean loss of a batch; ``count``: the terms that it is the mean of.
        at_once: records that go through the model together; 1 where they would share rows.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        batch_size: int,
        privacy: PrivacyConfig,
        loss: Loss,
        count: Count = len,
        at_once: int = 1,
    ) -> None:
        self._examples, self._privacy, self._loss = examples, privacy, loss
        self._count, self._at_once = count, at_once
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
        on_backward: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Leave the step's gradient in ``trained``.

        Records go through the model one by one where memory holds no more, where more than adapters
        and mixers is trained, and where the model does not keep a batch's rows apart.

        Args:
            model: its gradients are empty.
            trained: by name, all that is trained.
            batch: of records.
            on_backward: called when gradients are there.

        Returns:
            The mean loss of the batch's terms, which is not private; zero of none.
        """
        clip = self._privacy.record_clip
        assert clip is not None
        device = next(iter(trained.values())).device
        precise = sum_dtype(device)
        sums = {name: torch.zeros_like(p, dtype=precise) for name, p in trained.items()}
        total = torch.zeros((), dtype=precise, device=device)
        if HEAD in map(part_of, trained) or not keeps_rows_apart(model):
            self._at_once = 1
        for part, loss, gradients in self._parts(model, trained, batch):
            total += loss * self._count(part)
            on_backward()
            add_clipped(sums, gradients, clip)
            model.zero_grad(set_to_none=True)
        spread = self._privacy.noise * clip
        expected = self._rate * len(self._examples)
        for name, parameter in trained.items():
            noise = torch.from_numpy(self._random.standard_normal(parameter.shape))
            noised = sums[name] + spread * noise.to(device, precise)
            parameter.grad = (noised / expected).to(parameter.dtype)
        return total / max(self._count(batch), 1)

    def _parts(
        self, model: nn.Module, trained: Mapping[str, nn.Parameter], batch: Sequence[Any]
    ) -> Iterator[tuple[Sequence[Any], Tensor, State]]:
        """The batch, as many records at a time as will do, with mean loss and gradients of each."""
        rest = batch
        while rest:
            part, fewer = rest[: self._at_once], 0
            try:
                found = record_gradients(model, trained, part, self._loss, self._count)
            except HiddenRows:
                fewer = 1
            except (RuntimeError, MemoryError) as error:
                if len(part) == 1 or not out_of_memory(error):
                    raise
                fewer = (len(part) + 1) // 2
            if fewer:
                self._at_once = fewer
                model.zero_grad(set_to_none=True)
                free_memory(model)
                continue
            yield part, *found
            rest = rest[len(part) :]


def add_clipped(sums: Mapping[str, Tensor], gradients: Mapping[str, Tensor], clip: float) -> None:
    """Add records' gradients [B, ...] to the sums [...], each scaled down to norm ``clip``.

    One that is not finite is left out, so that no record can reveal itself by spoiling the sum.
    """
    squares = [g.to(sums[name].dtype).square().flatten(1).sum(1) for name, g in gradients.items()]
    norms = torch.stack(squares).sum(0).sqrt()
    finite = norms.isfinite()
    scales = (clip / norms[finite]).clamp(max=1)
    for name, g in gradients.items():
        into = sums[name]
        into.add_(torch.tensordot(scales, g[finite].to(into.dtype), 1))


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
    # Of fractional orders that it gives up it warns; without one of them epsilon is no lower.
    noisy = logging.getLogger("absl")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        accountant.compose(event, steps)
    finally:
        noisy.setLevel(level)
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

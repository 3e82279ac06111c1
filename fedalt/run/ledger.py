"""What every client's records have spent of their privacy, over all rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedalt.config import Config
from fedalt.run.stage import Member
from fedalt.training import count_steps, epsilon_after, sampling_rate


class Ledger:
    """Noised steps by client; without ``privacy.record_clip`` it has nothing to say."""

    def __init__(self, config: Config, members: Sequence[Member], spent: Mapping[str, int]) -> None:
        """
        Args:
            config: of the run; ``members``: its clients; ``spent``: as ``record`` gave it before.
        """
        self._config, self._privacy = config, config.privacy
        self._examples = {member.id: member.examples for member in members}
        self._spent = dict(spent)

    def record(self) -> dict[str, int]:
        return dict(self._spent)

    def add(self, client: str, steps: int) -> dict[str, Any]:
        """Note a turn's steps, whether its update counts or not; what is told of it."""
        if not self._privacy.on:
            return {}
        self._spent[client] = self._spent.get(client, 0) + steps
        epsilon = self._epsilon(client, 0)
        return {"epsilon": epsilon, "delta": self._privacy.delta, "steps": self._spent[client]}

    def refusal(self, client: str) -> str | None:
        """Why a client may train no further, or None."""
        if not self._privacy.on or self._privacy.epsilon is None:
            return None
        after = self._epsilon(client, count_steps(self._examples[client], self._config.train))
        if after <= self._privacy.epsilon:
            return None
        return f"its epsilon would be {after:.3g}, privacy.epsilon is {self._privacy.epsilon:g}"

    def closed(self) -> bool:
        """Whether no client may train any further."""
        return all(self.refusal(client) for client in self._examples)

    def _epsilon(self, client: str, more: int) -> float:
        rate = sampling_rate(self._examples[client], self._config.train.batch_size)
        steps = self._spent.get(client, 0) + more
        return epsilon_after(steps, rate, self._privacy.noise, self._privacy.delta)

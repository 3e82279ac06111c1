"""Record-level privacy of training: one section of the config."""

from __future__ import annotations

from dataclasses import dataclass

from fedalt.errors import require


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of every train record, by DP-SGD in the client's own steps."""

    record_clip: float | None = None
    """Each record's gradient, of all that is trained, is scaled down to this norm; null: no
    privacy. It takes the place of ``train.max_grad_norm``."""
    noise: float = 1.0
    """Standard deviation of the noise that is added to a step's sum of gradients, in units of
    ``record_clip``."""
    delta: float = 1e-5
    """The chance that epsilon does not hold; below one in the number of records."""
    epsilon: float | None = None
    """A client trains no further once its next round would exceed this; null: it is told, and
    nobody stops."""

    @property
    def on(self) -> bool:
        return self.record_clip is not None

    def __post_init__(self) -> None:
        clip_ok = self.record_clip is None or self.record_clip > 0
        require(clip_ok, "privacy.record_clip", "above 0, or null", self.record_clip)
        require(self.noise > 0, "privacy.noise", "above 0", self.noise)
        require(0 < self.delta < 1, "privacy.delta", "in (0, 1)", self.delta)
        budget_ok = self.epsilon is None or self.epsilon > 0
        require(budget_ok, "privacy.epsilon", "above 0, or null", self.epsilon)
        meant = self.on or self.epsilon is None
        require(meant, "privacy.epsilon", "left out without privacy.record_clip", self.epsilon)

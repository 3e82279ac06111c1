"""How sure a score is: the 95 % interval of a mean over a client's test records."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SHARES = ("accuracy", "exact_match", "choice", "choice_norm")
"""Metrics that count right answers; of others every record has a score of its own."""
Z = 1.959963984540054
"""The 97.5th percentile of the normal distribution."""
DRAWS = 2000


def interval(metric: str, value: float, records: int, scores: Sequence[float]) -> list[float]:
    """The 95 % interval of a client's ``value``, in percent; empty where it cannot be told.

    Of a share of right answers Wilson's, from their number; of another metric the percentile
    bootstrap over the records' own scores.

    Args:
        metric: whose value it is.
        value: the mean over the records, in percent.
        records: how many were scored.
        scores: each one's score in percent; may be empty, and of a share is not needed.
    """
    if metric in SHARES:
        return wilson(round(value * records / 100), records) if records else []
    return bootstrap(scores)


def wilson(right: int, records: int) -> list[float]:
    """Wilson's interval of a share, ``right`` of ``records``, in percent.

    ``(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)`` with p the share, n ``records``.
    """
    share, square = right / records, Z * Z / records
    middle = share + square / 2
    reach = math.sqrt(square * (share * (1 - share) + square / 4))
    ends = ((middle - reach) / (1 + square), (middle + reach) / (1 + square))
    return [100 * min(max(end, 0.0), 1.0) for end in ends]


def bootstrap(scores: Sequence[float]) -> list[float]:
    """The 2.5th and 97.5th percentile of the means of 2000 resamples, always the same ones."""
    if not scores:
        return []
    values, draw = np.asarray(scores, dtype=np.float64), np.random.default_rng(0)
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(DRAWS)]
    return [float(end) for end in np.percentile(means, [2.5, 97.5])]

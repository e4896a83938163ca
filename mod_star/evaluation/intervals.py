"""95 % confidence intervals of what an evaluation measures on a sample of questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mod_star.errors import require

Z = 1.959963984540054
"""Quantile 0.975 of the normal distribution: 95 % lie within ± Z."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    n: int
    """How many items it was measured on."""

    def __str__(self) -> str:
        """In per cent: "25.1 % (22.8 to 27.5)"."""
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


def accuracy(correct: Sequence[bool]) -> Estimate:
    """The share of right answers, with the Wilson score interval (Wilson 1927).

    It holds its level for few items and for shares near 0 and 1, where the normal interval is of width zero.

    Raises:
      InputError: there are no items.
    """
    n = len(correct)
    require(n > 0, "items", n, "must be at least one")
    share = sum(correct) / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    # At shares of 0 and 1 a bound equals the share, but for rounding.
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), n)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of values of any distribution, with the bootstrap's percentile interval (Efron 1979).

    10,000 resamples with a fixed seed: the same values give the same interval.

    Raises:
      InputError: there are no values.
    """
    n = len(values)
    require(n > 0, "items", n, "must be at least one")
    array = np.asarray(values, np.float64)
    rng = np.random.default_rng(0)
    # In parts: 10,000 resamples of 10,000 values at once would take 800 MB.
    part = max(1, min(RESAMPLES, 2_000_000 // n))
    means = np.concatenate(
        [array[rng.integers(0, n, (min(part, RESAMPLES - done), n))].mean(axis=1) for done in range(0, RESAMPLES, part)]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(array.mean()), float(low), float(high), n)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The mean of second - first, item by item, with the bootstrap's interval.

    Narrower than the difference of two separate estimates: what makes an item hard for both cancels.

    Raises:
      ValueError: the sequences differ in length.
    """
    return mean([b - a for a, b in zip(first, second, strict=True)])

"""95 % confidence intervals of what an evaluation measures on a sample of questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
    array = np.asarray(values, np.float64)
    return _bootstrapped(len(values), lambda chosen: array[chosen].mean(axis=-1))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The ratio of two sums over items, with the bootstrap's percentile interval over items.

    Args:
      numerators: one number for each item.
      denominators: the same, above 0.

    Raises:
      InputError: there are no items.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    return _bootstrapped(len(top), lambda chosen: top[chosen].sum(axis=-1) / bottom[chosen].sum(axis=-1))


def _bootstrapped(n: int, statistic: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]) -> Estimate:
    """A statistic of n items, and its quantiles over resamples; it is given indices RxN and returns R values."""
    require(n > 0, "items", n, "must be at least one")
    rng = np.random.default_rng(0)
    # In parts: 10,000 resamples of 10,000 values at once would take 800 MB.
    part = max(1, min(RESAMPLES, 2_000_000 // n))
    values = np.concatenate(
        [statistic(rng.integers(0, n, (min(part, RESAMPLES - done), n))) for done in range(0, RESAMPLES, part)]
    )
    low, high = np.quantile(values, (0.025, 0.975))
    return Estimate(float(statistic(np.arange(n)[None])[0]), float(low), float(high), n)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The mean of second - first, item by item, with the bootstrap's interval.

    Narrower than the difference of two separate estimates: what makes an item hard for both cancels.

    Raises:
      ValueError: the sequences differ in length.
    """
    return mean([b - a for a, b in zip(first, second, strict=True)])

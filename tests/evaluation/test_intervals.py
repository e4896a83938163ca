"""Confidence intervals against independent ways to get them: Wilson's equation solved, the normal approximation."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from mod_star.errors import InputError
from mod_star.evaluation.intervals import accuracy, mean, paired_difference, ratio


@pytest.mark.parametrize(("right", "n"), [(0, 5), (1, 7), (30, 200), (100, 200), (199, 200), (50, 50)])
def test_the_ends_are_the_shares_that_the_result_is_just_compatible_with(right: int, n: int) -> None:
    """Wilson's ends p solve |share - p| = z sqrt(p (1 - p) / n): found here by bisection."""
    z, share = NormalDist().inv_cdf(0.975), right / n

    def excess(p: float) -> float:
        return abs(share - p) - z * math.sqrt(p * (1 - p) / n)

    def solve(inner: float, outer: float) -> float:
        """The p between `inner`, where the excess is negative, and `outer`, where it is positive."""
        for _ in range(200):
            middle = (inner + outer) / 2
            inner, outer = (middle, outer) if excess(middle) < 0 else (inner, middle)
        return inner

    found = accuracy([True] * right + [False] * (n - right))
    assert found.value == share and found.n == n
    assert found.low == pytest.approx(solve(share, 0.0) if right else 0.0, abs=1e-9)
    assert found.high == pytest.approx(solve(share, 1.0) if right < n else 1.0, abs=1e-9)


def test_the_value_lies_in_its_interval_in_spite_of_rounding() -> None:
    for n in range(1, 300):
        for right in (0, n):
            found = accuracy([True] * right + [False] * (n - right))
            assert found.low <= found.value <= found.high, (right, n, found)


def test_the_bootstrap_agrees_with_the_normal_interval_where_that_holds() -> None:
    values = np.random.default_rng(3).beta(2, 5, 400)
    found = mean(values.tolist())
    half = NormalDist().inv_cdf(0.975) * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.06 * half)
    assert mean(values.tolist()) == found, "the same values, the same interval"


def test_a_ratio_of_sums_is_resampled_by_items() -> None:
    rng = np.random.default_rng(4)
    bottom = rng.integers(1, 30, 300).astype(float)
    top = bottom * rng.beta(6, 2, 300)
    found = ratio(top.tolist(), bottom.tolist())
    share = top.sum() / bottom.sum()
    # The delta method's standard error of a ratio of two means.
    half = NormalDist().inv_cdf(0.975) * np.std(top - share * bottom) / (math.sqrt(300) * bottom.mean())
    assert found.value == pytest.approx(share) and found.n == 300
    assert found.low == pytest.approx(share - half, abs=0.08 * half)
    assert found.high == pytest.approx(share + half, abs=0.08 * half)
    assert ratio(top.tolist(), [1.0] * 300) == mean(top.tolist())
    with pytest.raises(InputError, match=r"^items = 0"):
        ratio([], [])


def test_of_skewed_values_the_interval_stays_where_values_are() -> None:
    found = mean([0.0] * 18 + [1.0, 0.4])
    assert 0 <= found.low < found.value < found.high <= 1
    assert found.high - found.value > found.value - found.low, "skewed as the values are"
    alone = mean([0.3])
    assert (alone.low, alone.value, alone.high) == (0.3, 0.3, 0.3)


def test_paired_differences_are_narrower_than_apart() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(300) < 0.5
    first = hard & (rng.random(300) < 0.9)
    second = hard & (rng.random(300) < 0.9)
    paired = paired_difference(first.astype(float).tolist(), second.astype(float).tolist())
    apart = accuracy(first.tolist())
    assert paired.value == pytest.approx(second.mean() - first.mean())
    assert paired.low <= paired.value <= paired.high
    assert paired.high - paired.low < 0.9 * math.sqrt(2) * (apart.high - apart.low)
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 0.0], [1.0])


def test_nothing_has_no_interval() -> None:
    for estimate in (accuracy, mean):
        with pytest.raises(InputError, match="items = 0: must be at least one"):
            estimate([])

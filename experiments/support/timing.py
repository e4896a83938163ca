"""How the benchmarks measure time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def seconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call by a clock, the result awaited."""
    began = clock()
    jax.block_until_ready(function())
    return clock() - began


def in_turns(
    functions: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each function, called in turns; the first round warms up and doesn't count.

    With `time.process_time` as clock they are seconds of processors, which other programs change less.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            times[name].append(seconds(function, clock))
    return {name: statistics.median(values[1:]) for name, values in times.items()}

"""How the next token is drawn, against NumPy in float64 and against the probabilities themselves."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_models import log_softmax, restrict_naively

from mod_star.decoding.sampling import Sampling, draw, restrict
from mod_star.errors import InputError

TIED = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -1.0, 0.5], np.float32)


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(0, 1.0), (1, 1.0), (3, 1.0), (7, 1.0), (100, 1.0), (0, 0.3), (0, 0.9), (5, 0.7), (2, 1e-6), (0, 0.999)],
)
@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_restrict_is_top_k_then_top_p(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(top_k).standard_normal((4, 40)).astype(np.float32)
    for row in (*logits, TIED):
        found = np.asarray(restrict(jnp.asarray(row), Sampling(temperature, top_k, top_p)))
        expected = restrict_naively(row, temperature, top_k, top_p)
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
        kept = np.isfinite(expected)
        np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-6)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.1), (0, 1.0, 1.0), (6, 0.8, 0.3), (3, 0.99, 1e-6)])
@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_min_p_comes_last(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = np.random.default_rng(8).standard_normal((4, 40)).astype(np.float32)
    for row in (*logits, TIED):
        restricted = np.asarray(restrict(jnp.asarray(row), Sampling(temperature, top_k, top_p, min_p)))
        expected = restrict_naively(row, temperature, top_k, top_p, min_p)
        np.testing.assert_array_equal(np.isfinite(restricted), np.isfinite(expected))
    # With probabilities 0.5, 0.3, 0.2 nothing is renormalised before the ratio to 0.5 is taken.
    row = jnp.log(jnp.asarray([0.3, 0.5, 0.2]))
    for least, kept in ((0.39, [0, 1, 2]), (0.41, [0, 1]), (0.61, [1])):
        assert np.flatnonzero(np.isfinite(restrict(row, Sampling(min_p=least)))).tolist() == kept


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=1), {1, 3}),
        (Sampling(top_k=2), {1, 3}),
        (Sampling(top_k=3), {1, 2, 3, 4, 5}),
        (Sampling(top_p=0.01), {1, 3}),
        (Sampling(top_p=0.7), {1, 2, 3, 4, 5}),
    ],
)
def test_tokens_that_tie_for_the_last_place_stay(sampling: Sampling, kept: set[int]) -> None:
    assert set(np.flatnonzero(np.isfinite(restrict(jnp.asarray(TIED), sampling)))) == kept


def test_a_sum_that_is_reached_exactly_is_enough() -> None:
    """Two tokens of probability 1/2 each, whose logits differ by less than float32 has digits after the exponential."""
    restricted = restrict(jnp.asarray([-1e-9, 0.0], jnp.float32), Sampling(top_p=0.5))
    assert np.isfinite(restricted).tolist() == [False, True]


def test_greedy_is_the_most_probable_token_and_the_lowest_id_of_several() -> None:
    assert int(draw(jax.random.key(0), jnp.asarray(TIED), Sampling(0))) == 1
    assert int(draw(jax.random.key(1), jnp.asarray(-TIED), Sampling(0, top_k=2, top_p=0.1))) == 6


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.5), Sampling(2.0, top_k=4), Sampling(1.0, 6, 0.8), Sampling(2.0, min_p=0.4)]
)
def test_draws_come_as_often_as_they_are_probable(sampling: Sampling) -> None:
    logits = np.random.default_rng(3).standard_normal(8).astype(np.float32)
    count = 20_000
    keys = jax.random.split(jax.random.key(5), count)
    tokens = jax.jit(jax.vmap(functools.partial(draw, sampling=sampling), (0, None)))(keys, logits)
    numbers = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    probable = np.exp(log_softmax(restrict_naively(logits, *numbers)))
    observed = np.bincount(np.asarray(tokens), minlength=8)
    assert observed[probable == 0].sum() == 0
    expected = count * probable[probable > 0]
    chi_squared = float(np.sum((observed[probable > 0] - expected) ** 2 / expected))
    freedom = len(expected) - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom), "about one in ten thousand"


@pytest.mark.slow
def test_a_cold_temperature_is_greedy_and_never_nan() -> None:
    logits = jnp.asarray([-300.0, 250.0, 400.0, 399.0])
    assert {int(draw(jax.random.key(i), logits, Sampling(1e-6, top_p=0.9))) for i in range(8)} == {2}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"temperature": 1e-30}, "temperature = 1e-30"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": math.nan}, "top_p = nan"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"min_p": 1.5}, "min_p = 1.5"),
        ({"min_p": math.nan}, "min_p = nan"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}: must"):
        Sampling(**fields)

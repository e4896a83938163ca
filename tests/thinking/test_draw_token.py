"""Drawing a token: its frequencies, against softmax; the cases where rounding or padding could let in a wrong one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.thinking.thought import draw_token

DRAWS = 20_000


# Logits and keys are arguments: closed over, XLA would work out all draws while compiling.
draw = jax.jit(jax.vmap(draw_token, (0, None, None)), static_argnums=2)


def drawn(logits: Any, temperature: float) -> Any:
    return draw(jax.random.split(jax.random.key(3), DRAWS), jnp.asarray(logits, jnp.float32), temperature)


def softmax(logits: Any) -> Any:
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return e / e.sum()


@pytest.mark.parametrize(("vocabulary", "temperature"), [(5, 3.0), (128, 0.7), (300, 1.0), (300, 3.0)])
def test_frequencies_are_those_of_softmax(vocabulary: int, temperature: float) -> None:
    logits = np.random.default_rng(vocabulary).normal(size=vocabulary)
    p = softmax(logits / temperature)
    tokens = drawn(logits + 100, temperature)
    assert tokens.dtype == jnp.int32 and tokens.min() >= 0 and tokens.max() < vocabulary
    counts = np.bincount(tokens, minlength=vocabulary)
    chi_square = np.sum((counts - DRAWS * p) ** 2 / (DRAWS * p))
    degrees = vocabulary - 1
    assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees), "about 4 standard deviations"


@pytest.mark.slow
def test_of_flat_logits_each_token_is_drawn_and_of_peaked_ones_the_peak() -> None:
    counts = np.bincount(drawn(np.zeros(300), 1.0), minlength=300)
    assert len(counts) == 300 and np.all(np.abs(counts - DRAWS / 300) < 5 * np.sqrt(DRAWS / 300))
    for peak in (127, 299):
        assert np.all(drawn(60.0 * (np.arange(300) == peak), 1.0) == peak)
    assert np.all(draw(jax.random.split(jax.random.key(0), 100), 1e-4 * (jnp.arange(300) == 128), 1e-6) == 128)


def test_a_logit_of_minus_infinity_is_never_drawn() -> None:
    """Not as the first of a block, not as the last, and not a whole block of them."""
    allowed = [3, 126, 256, 259]
    logits = np.full(300, -np.inf)
    logits[allowed] = 0.0
    tokens, counts = np.unique(drawn(logits, 1.0), return_counts=True)
    assert tokens.tolist() == allowed
    assert np.all(np.abs(counts - DRAWS / 4) < 5 * np.sqrt(DRAWS / 4))


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_at_both_ends_of_the_interval_a_possible_token_is_drawn(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.full(shape, number, dtype))
    for allowed in ([3], [200, 201], [130, 290], [0, 299]):
        logits = np.full(300, -np.inf, np.float32)
        logits[allowed] = np.arange(len(allowed))
        token = draw_token(jax.random.key(0), jnp.asarray(logits), 1.0)
        assert int(token) == allowed[0 if number == 0 else -1]


def test_temperature_zero_is_the_most_probable_token_and_needs_no_key() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 300)), jnp.float32)
    for seed in (0, 1):
        tokens = jax.vmap(draw_token, (0, 0, None))(jax.random.split(jax.random.key(seed), 50), logits, 0.0)
        np.testing.assert_array_equal(tokens, logits.argmax(1))
        assert tokens.dtype == jnp.int32


def test_rows_of_a_batch_are_drawn_as_each_alone() -> None:
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3, 140)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), (4, 3))
    alone = jax.jit(lambda key, row: draw_token(key, row, 1.0))
    together = jax.jit(jax.vmap(jax.vmap(alone)))(keys, logits)
    np.testing.assert_array_equal(together, [[alone(keys[i, j], logits[i, j]) for j in range(3)] for i in range(4)])
    assert len(np.unique(together)) > 6

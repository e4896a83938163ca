"""The largest logits found in blocks are those of NumPy, with ties, where the vocabulary is no multiple of a block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.decoding.largest import BLOCK, MANY, argmax, largest
from mod_star.decoding.sampling import log_prob_and_gap


@pytest.mark.parametrize("vocabulary", [7, MANY, 20_001])
@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_are_those_of_numpy(vocabulary: int, ties: bool) -> None:
    logits = np.random.default_rng(0).normal(size=(5, vocabulary)).astype(np.float32) * 4
    logits = np.round(logits) if ties else logits
    logits[1] = 3.0
    logits[2, : vocabulary // 2] = -np.inf
    logits[3, -1] = 99.0
    assert jax.jit(argmax)(logits).tolist() == np.argmax(logits, -1).tolist(), "of equal ones the lowest"
    assert argmax(jnp.asarray(logits)).dtype == jnp.int32
    for count in (1, 2, 5, 20 if vocabulary > BLOCK else 7):
        np.testing.assert_array_equal(largest(jnp.asarray(logits), count), -np.sort(-logits, -1)[:, :count])


def test_gaps_and_log_probabilities_of_a_large_vocabulary() -> None:
    logits = np.random.default_rng(1).normal(size=(4, 20_001)).astype(np.float32) * 4
    logits[0, [3, 20_000]] = 40.0
    tokens = np.array([3, 20_000, 0, int(np.argmax(logits[3]))], np.int32)
    log_probs, gaps = log_prob_and_gap(jnp.asarray(logits), jnp.asarray(tokens))
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    best = -np.sort(-np.exp(log_p), -1)
    np.testing.assert_allclose(log_probs, log_p[np.arange(4), tokens], rtol=1e-5)
    np.testing.assert_allclose(gaps, best[:, 0] - best[:, 1], atol=1e-6)

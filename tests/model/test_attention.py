"""Attention over segments: against loops in float64, against one long segment."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.model.attention import KeyValues, attend

N, H, K, E, M = 6, 4, 2, 8, 14
RNG = np.random.default_rng(0)
QUERY = jnp.asarray(RNG.normal(size=(N, H, E)), jnp.float32)
POSITIONS = jnp.asarray([3, 4, 5, 0, 1, 7])
DOCUMENTS = jnp.asarray([1, 1, 1, 2, 2, 3])  # nothing to see for the last one
KEYS = KeyValues(
    jnp.asarray(RNG.normal(size=(K, M, E)), jnp.float32),
    jnp.asarray(RNG.normal(size=(K, M, E)), jnp.float32),
    jnp.asarray([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 1, 2, 3]),
    jnp.asarray([1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0]),
    jnp.asarray([1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0], bool),
)


def part(start: int, end: int) -> KeyValues:
    keys, values = KEYS.keys_KxMxE[:, start:end], KEYS.values_KxMxE[:, start:end]
    rest = (a[start:end] for a in (KEYS.positions_M, KEYS.segment_ids_M, KEYS.valid_M))
    return KeyValues(keys, values, *rest)


def test_equals_loops_in_float64() -> None:
    keys, values = np.asarray(KEYS.keys_KxMxE, np.float64), np.asarray(KEYS.values_KxMxE, np.float64)
    expected = np.zeros((N - 1, H, E))
    for n in range(N - 1):
        for h in range(H):
            kv = h // (H // K)
            weights = [
                np.exp(np.asarray(QUERY[n, h], np.float64) @ keys[kv, m] / np.sqrt(E))
                if KEYS.valid_M[m] and KEYS.segment_ids_M[m] == DOCUMENTS[n] and KEYS.positions_M[m] <= POSITIONS[n]
                else 0.0
                for m in range(M)
            ]
            expected[n, h] = np.array(weights) @ values[kv] / sum(weights)
    result = jax.jit(attend)(QUERY, POSITIONS, DOCUMENTS, (KEYS,))
    np.testing.assert_allclose(result[:-1], expected, rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(result)), "a query that sees nothing"


@pytest.mark.parametrize("cuts", [(7,), (3, 10), (1, 2, 13)])
def test_several_segments_equal_their_concatenation_in_value_and_gradient(cuts: tuple[int, ...]) -> None:
    edges = [0, *cuts, M]
    pieces = tuple(part(a, b) for a, b in itertools.pairwise(edges))

    def loss(query: jax.Array, segments: tuple[KeyValues, ...]) -> jax.Array:
        return jnp.sum(jnp.sin(attend(query, POSITIONS, DOCUMENTS, segments))[:-1])

    run = jax.jit(jax.value_and_grad(loss, (0, 1), allow_int=True))
    whole_value, (whole_query, (whole,)) = run(QUERY, (KEYS,))
    value, (grad_query, grads) = run(QUERY, pieces)
    np.testing.assert_allclose(value, whole_value, rtol=1e-5)
    np.testing.assert_allclose(grad_query, whole_query, rtol=1e-4, atol=1e-6)
    for name in ("keys_KxMxE", "values_KxMxE"):
        joined = np.concatenate([getattr(g, name) for g in grads], 1)
        np.testing.assert_allclose(joined, getattr(whole, name), rtol=1e-4, atol=1e-6)


def test_large_scores_stay_finite() -> None:
    result = jax.jit(attend)(QUERY * 1e4, POSITIONS, DOCUMENTS, (part(0, 5), part(5, M)))
    assert np.all(np.isfinite(result))


def test_bfloat16_softmax_is_float32() -> None:
    cast = lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a  # noqa: E731
    narrow = jax.tree.map(cast, (QUERY, KEYS))
    result = jax.jit(attend)(narrow[0], POSITIONS, DOCUMENTS, (narrow[1],))
    assert result.dtype == jnp.bfloat16
    expected = jax.jit(attend)(QUERY, POSITIONS, DOCUMENTS, (KEYS,))
    np.testing.assert_allclose(result[:-1].astype(jnp.float32), expected[:-1], atol=0.03)
    text = jax.jit(attend).lower(narrow[0], POSITIONS, DOCUMENTS, (narrow[1],)).as_text()
    kinds = re.findall(r"stablehlo.exponential .* : tensor<[\dx]*x(\w+)>", text)
    assert kinds and set(kinds) == {"f32"}

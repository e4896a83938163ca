"""The chunked loss against optax on full logits; that the full logits never exist is in training/test_step.py."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mod_star.model import cross_entropy as module

cross_entropy: Any = module.cross_entropy

B, S, D, V = 2, 7, 5, 11


def inputs(dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, S, D)), dtype)
    head = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, S)))
    weights = jnp.asarray(rng.choice([0.0, 1.0, 0.5], (B, S)), jnp.float32)
    return hidden, head, targets, weights


def full(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    logits = hidden.astype(jnp.float32) @ head.T
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_value_and_gradients_equal_optax_on_full_logits(chunk: int) -> None:
    given = inputs()
    scaled = lambda f: jax.jit(jax.value_and_grad(lambda *a: f(*a) / 3, (0, 1)))  # noqa: E731
    value, grads = scaled(lambda *a: cross_entropy(*a, chunk))(*given)
    expected, expected_grads = scaled(full)(*given)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, expected_grads)
    np.testing.assert_allclose(jax.jit(lambda *a: cross_entropy(*a, chunk))(*given), 3 * expected, rtol=1e-5)


def test_value_equals_float64() -> None:
    hidden, head, targets, weights = (np.asarray(a, np.float64) for a in inputs())
    total = 0.0
    for b in range(B):
        for s in range(S):
            logits = head @ hidden[b, s]
            total += weights[b, s] * (np.log(np.sum(np.exp(logits))) - logits[int(targets[b, s])])
    np.testing.assert_allclose(cross_entropy(*inputs(), 3), total, rtol=1e-6)


def test_logits_too_large_for_exp_are_fine() -> None:
    hidden, *rest = inputs()
    value, grad = jax.value_and_grad(cross_entropy)(hidden * 1e3, *rest, 3)
    assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_in_bfloat16_the_sum_and_the_head_gradient_are_float32_and_no_factor_is_rounded() -> None:
    given = inputs(jnp.bfloat16)
    factor = 1 / 3000  # rounds by 0.2 % in bfloat16
    value, (hidden, head) = jax.jit(jax.value_and_grad(lambda *a: cross_entropy(*a, 4) * factor, (0, 1)))(*given)
    assert value.dtype == jnp.float32 and hidden.dtype == jnp.bfloat16 and head.dtype == jnp.float32
    expected, (expected_hidden, expected_head) = jax.jit(jax.value_and_grad(lambda *a: full(*a) * factor, (0, 1)))(
        given[0].astype(jnp.float32), *given[1:]
    )
    np.testing.assert_allclose(value, expected, rtol=0.01)
    scale = np.abs(expected_head).max()
    np.testing.assert_allclose(head, expected_head, atol=0.02 * scale)
    np.testing.assert_allclose(hidden.astype(jnp.float32), expected_hidden, atol=0.02 * np.abs(expected_hidden).max())
    # Before the last rounding of each element, gradients are exactly proportional to the factor.
    unscaled = jax.jit(jax.grad(lambda *a: cross_entropy(*a, 4)))(*given)
    np.testing.assert_array_equal(hidden, (unscaled.astype(jnp.float32) * jnp.float32(factor)).astype(jnp.bfloat16))


@pytest.mark.parametrize("chunk", [3, 7])
def test_every_tokens_nll_and_entropy_equal_float64(chunk: int) -> None:
    hidden, head, targets, weights = inputs()
    total, nll = jax.jit(lambda *a: module.cross_entropy_by_token(*a, chunk))(hidden, head, targets, weights)
    entropy = jax.jit(lambda h, w: module.token_entropy(h, w, chunk))(hidden, head)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, (expected * np.asarray(weights)).sum(), rtol=1e-6)
    np.testing.assert_allclose(entropy, -(np.exp(log_p) * log_p).sum(-1), rtol=1e-5)
    assert nll.shape == entropy.shape == (B, S) and nll.dtype == entropy.dtype == jnp.float32


def test_every_tokens_nll_is_given_without_a_gradient() -> None:
    """Rewards are made of them: a gradient there would teach the model to change its baseline."""

    def both(hidden: jax.Array, head: jax.Array, factor: float) -> jax.Array:
        total, nll = module.cross_entropy_by_token(hidden, head, *inputs()[2:], 3)
        return total + factor * jnp.sum(jnp.sin(nll))

    gradient = jax.jit(jax.grad(both, (0, 1)))
    jax.tree.map(np.testing.assert_array_equal, gradient(*inputs()[:2], 5.0), gradient(*inputs()[:2], 0.0))

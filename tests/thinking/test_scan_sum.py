"""A sum over chunks and its gradient, against autodiff of the plain sum."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mod_star.thinking.scan_sum import scan_sum

COUNT = 5


def given() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    real = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    shared = {"weight": real(3, 4), "ids": jnp.asarray([2, 0, 1]), "pair": (real(4).astype(jnp.bfloat16), real())}
    return shared, {"x": real(COUNT, 3), "number": jnp.arange(COUNT, dtype=jnp.int32)}


def function(shared: Any, chunk: Any) -> tuple[jax.Array, Any]:
    hidden = jnp.sin(chunk["x"][shared["ids"]] @ shared["weight"]) * shared["pair"][0].astype(jnp.float32)
    value = jnp.sum(hidden) * shared["pair"][1] * (1 + chunk["number"])
    return value, {"hidden": hidden, "ids": shared["ids"] + chunk["number"]}


def plain(shared: Any, chunks: Any) -> tuple[jax.Array, Any]:
    values, extras = jax.vmap(function, (None, 0))(shared, chunks)
    return jnp.sum(values), extras


def test_value_extras_and_gradients_equal_plain_autodiff_of_the_sum() -> None:
    shared, chunks = given()

    def scaled(total: Any) -> Any:
        def loss(shared: Any) -> Any:
            value, extras = total({**shared, "weight": 2 * shared["weight"]}, chunks)
            return value / 7, extras

        return jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))(shared)

    (value, extras), grads = scaled(lambda s, c: scan_sum(function, s, c))
    (expected, expected_extras), expected_grads = scaled(plain)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, strict=True), extras, expected_extras)
    assert grads.pop("ids").dtype == expected_grads.pop("ids").dtype == jax.dtypes.float0
    np.testing.assert_allclose(grads["weight"], expected_grads["weight"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads["pair"][1], expected_grads["pair"][1], rtol=1e-5)
    assert grads["pair"][0].dtype == jnp.bfloat16
    # Each chunk's is rounded to bfloat16, as is the sum.
    low, expected_low = (g["pair"][0].astype(jnp.float32) for g in (grads, expected_grads))
    np.testing.assert_allclose(low, expected_low, atol=0.01 * np.abs(expected_low).max())
    (without_gradient, _) = jax.jit(lambda s: scan_sum(function, s, chunks))({**shared, "weight": 2 * shared["weight"]})
    np.testing.assert_allclose(without_gradient, 7 * value, rtol=1e-6)


def test_chunks_and_extras_carry_no_gradient() -> None:
    shared, chunks = given()

    def loss(weight: jax.Array, x: jax.Array, factor: float) -> jax.Array:
        value, extras = scan_sum(function, {**shared, "weight": weight}, {**chunks, "x": x})
        return value + factor * jnp.sum(extras["hidden"] ** 2)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    (with_extras, of_chunks), (without, _) = (gradient(shared["weight"], chunks["x"], f) for f in (3.0, 0.0))
    assert not np.any(of_chunks)
    np.testing.assert_array_equal(with_extras, without)
    assert np.any(without)


def test_gradients_of_bfloat16_leaves_add_up_in_float32() -> None:
    """600 ones added up in bfloat16 make 256."""
    leaf = jnp.ones((), jnp.bfloat16)
    total = lambda leaf: scan_sum(lambda s, _: (s.astype(jnp.float32), None), leaf, jnp.zeros(600))[0]  # noqa: E731
    assert jax.jit(jax.grad(total))(leaf) == 600

"""`linear` equals x @ w in value and gradients, and stays one two-dimensional product under `vmap`."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_SHIPPED

from mod_star.model.linear import _product_on_tpu, linear, linear_saveable

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 3, 4, 5)), jnp.float32)
Product = Callable[[jax.Array, jax.Array], Any]
W = jnp.asarray(RNG.normal(size=(5, 6)), jnp.float32)


def nested(product: Product) -> Product:
    return jax.vmap(jax.vmap(product, (0, None)), (0, None))


def dots(text: str) -> list[str]:
    return re.findall(r"stablehlo\.dot_general.*", text)


def test_under_nested_vmap_there_is_one_two_dimensional_product_forward_and_two_backward() -> None:
    (dot,) = dots(jax.jit(nested(linear)).lower(X, W).as_text())
    assert "(tensor<24x5xf32>, tensor<5x6xf32>) -> tensor<24x6xf32>" in dot

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(nested(linear)(x, w)))

    found = dots(jax.jit(jax.grad(loss, (0, 1))).lower(X, W).as_text())
    assert len(found) == 3 and not any("batching_dims" in dot for dot in found)
    assert sum("(tensor<24x5xf32>, tensor<24x6xf32>) -> tensor<5x6xf32>" in dot for dot in found) == 1


@pytest.mark.parametrize(("rows", "multiplied"), [(1, 8), (2, 2), (4, 4)])
def test_on_tpus_a_single_row_is_filled_up_to_a_product(rows: int, multiplied: int) -> None:
    x = X[0, 0, :rows]
    lowered = jax.jit(linear).trace(x, W).lower(lowering_platforms=("tpu",))
    (dot,) = dots(lowered.as_text())
    assert f"(tensor<{multiplied}x5xf32>, tensor<5x6xf32>)" in dot
    assert f"-> (tensor<{rows}x6xf32>" in lowered.as_text()
    by_tpu = _product_on_tpu(x, W, dtype=jnp.float32, transposed=False, precision=None, kept=True)
    np.testing.assert_allclose(by_tpu, np.asarray(x, np.float64) @ np.asarray(W, np.float64), rtol=1e-5, atol=1e-6)


def compositions() -> dict[str, Callable[[jax.Array, jax.Array, Product], jax.Array]]:
    """Functions of (x, w, product) that return a scalar, by name."""

    def scanned(x: jax.Array, w: jax.Array, product: Product) -> jax.Array:
        def step(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
            return total + jnp.sum(jnp.sin(jax.vmap(product, (0, None))(row, w))), None

        return jax.lax.scan(step, jnp.zeros(()), x)[0]

    def checkpointed(x: jax.Array, w: jax.Array, product: Product) -> jax.Array:
        inner = jax.checkpoint(lambda a, b: jnp.sin(product(jnp.cos(product(a, b)) @ b.T, b)), policy=linear_saveable)
        return jnp.sum(nested(inner)(x, w))

    return {
        "plain": lambda x, w, product: jnp.sum(jnp.sin(product(x[0, 0], w))),
        "nested": lambda x, w, product: jnp.sum(jnp.sin(nested(product)(x, w))),
        "other axes": lambda x, w, product: jnp.sum(jnp.sin(jax.vmap(product, (1, None), 1)(x[0], w))),
        "batched weight": lambda x, w, product: jnp.sum(
            jnp.sin(jax.vmap(product, (None, 0))(x[0, 0], jnp.stack([w, 2 * w])))
        ),
        "both batched": lambda x, w, product: jnp.sum(jnp.sin(jax.vmap(product)(x[0], jnp.stack([w, 2 * w, -w])))),
        "scan": scanned,
        "checkpoint": checkpointed,
    }


@pytest.mark.parametrize("name", compositions())
def test_values_and_gradients_equal_those_of_the_matrix_product(name: str) -> None:
    composed = compositions()[name]
    ours = jax.jit(jax.value_and_grad(lambda x, w: composed(x, w, linear), (0, 1)))(X, W)
    theirs = jax.jit(jax.value_and_grad(lambda x, w: composed(x, w, jnp.matmul), (0, 1)))(X, W)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, theirs)


def test_per_example_gradients_and_the_unjitted_path() -> None:
    def gradient(product: Product) -> jax.Array:
        return jax.vmap(jax.grad(lambda w, x: jnp.sum(jnp.sin(product(x, w)))), (None, 0))(W, X[0])

    np.testing.assert_allclose(gradient(linear), gradient(jnp.matmul), rtol=1e-5, atol=1e-5)
    with jax.disable_jit():
        np.testing.assert_allclose(nested(linear)(X, W), X @ W, rtol=1e-5)


@pytest.mark.slow
def test_second_derivatives() -> None:
    def hessian(product: Product) -> jax.Array:
        return jax.hessian(lambda w: jnp.sum(jnp.sin(product(X[0, 0, :2], w))))(W[:, :2])

    np.testing.assert_allclose(hessian(linear), hessian(jnp.matmul), rtol=1e-4, atol=1e-5)


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    for x, w in [((3, 4), (5, 6)), ((4,), (4, 6)), ((2, 3, 4), (4, 6))]:
        with pytest.raises(TypeError, match="linear takes NxD and DxF"):
            linear(jnp.zeros(x), jnp.zeros(w))
    with pytest.raises(TypeError, match="one type"):
        linear(jnp.zeros((2, 3), jnp.bfloat16), jnp.zeros((3, 4)))


def test_a_transposed_weight_is_the_same_product_and_has_the_same_gradients() -> None:
    def loss(x: jax.Array, w: jax.Array, product: Product) -> jax.Array:
        return jnp.sum(jnp.sin(nested(product)(x, w)))

    ours = jax.grad(lambda x, w: loss(x, w, partial(linear, transposed=True)), (0, 1))(X, W.T)
    theirs = jax.grad(lambda x, w: loss(x, w, lambda x, w: x @ w.T), (0, 1))(X, W.T)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, theirs)
    with pytest.raises(TypeError, match="linear takes NxD and FxD"):
        linear(X[0, 0], W, transposed=True)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("transposed", [False, True])
def test_16_bit_weights_are_never_converted_as_a_whole(rows: int, transposed: bool) -> None:
    x, w = (jnp.asarray(RNG.normal(size=size), jnp.bfloat16) for size in ((rows, 64), (64, 160)))
    product = jax.jit(partial(linear, dtype=jnp.float32, transposed=transposed))
    stored = w.T if transposed else w
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(product(x, stored), exact, rtol=1e-5, atol=1e-5)
    assert product(x, stored).shape == (rows, 160)
    program = str(product.lower(x, stored).compile(AS_SHIPPED).as_text())
    assert "bf16[" in program and not re.search(r"= f32\[(64,160|160,64)\]", program)

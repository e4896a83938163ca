"""The loop that reads int8 weights on a CPU gives the product, and widens no weight outside of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_SHIPPED

from mod_star.model import int8_cpu
from mod_star.model.int8 import quantise
from mod_star.model.int8_cpu import LANES, TERMS, in_blocks, one_row, slice_size
from mod_star.model.linear import linear

RNG = np.random.default_rng(0)


def test_slices_divide_the_inputs_and_are_few() -> None:
    for inputs in range(1, 2049):
        fitting = [n for n in range(1, inputs + 1) if inputs % n == 0 and n % LANES == 0 and inputs // n <= TERMS]
        assert slice_size(inputs) == min(fitting, default=None)


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 32), (40, 96), (24, 576), (3, 1536)])
def test_one_row_is_the_product_in_float64(outputs: int, inputs: int) -> None:
    values = RNG.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    x = RNG.standard_normal((1, inputs)).astype(np.float32)
    exact = x.astype(np.float64) @ values.T
    product = jax.jit(one_row)(x, values)
    assert product is not None and product.dtype == jnp.float32
    np.testing.assert_allclose(product, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
    narrow = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(narrow, np.float64) @ values.T
    product = one_row(narrow, jnp.asarray(values))
    assert product is not None
    np.testing.assert_allclose(product, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 63])
def test_what_is_not_finite_stays_so(value: float, place: int) -> None:
    x = np.ones((1, 64), np.float32)
    x[0, place] = value
    assert not np.isfinite(np.asarray(jax.jit(one_row)(x, np.ones((5, 64), np.int8)))).any()


@pytest.mark.parametrize(("outputs", "block"), [(1, 10**6), (7, 10**6), (40, 6), (41, 6), (40, 1)])
def test_several_rows_are_the_product_in_float64(monkeypatch: pytest.MonkeyPatch, outputs: int, block: int) -> None:
    inputs = 20
    monkeypatch.setattr(int8_cpu, "BLOCK_BYTES", block * inputs * 4)  # of that many outputs
    values = RNG.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    x = RNG.standard_normal((3, inputs)).astype(np.float32)
    x[0, 0] = np.nan
    product = jax.jit(in_blocks)(x, values)
    exact = x.astype(np.float64) @ values.T
    np.testing.assert_allclose(product, exact, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(exact)))


def test_inputs_that_no_slice_divides_are_left_to_others() -> None:
    assert one_row(jnp.ones((1, 40)), jnp.ones((5, 40), jnp.int8)) is None
    weight = quantise(jnp.asarray(RNG.standard_normal((40, 5)), jnp.float32), 1)
    np.testing.assert_allclose(linear(jnp.ones((1, 40)), weight), weight.widened().sum(0)[None], atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_loop_over_tokens_holds_no_widened_weight(rows: int) -> None:
    D = 384
    weight = quantise(jnp.asarray(RNG.standard_normal((D, D)) / D, jnp.float32), 1)

    def tokens(x_NxD: jax.Array, weight: object, count: int) -> jax.Array:
        def body(_: int, x_NxD: jax.Array) -> jax.Array:
            return jnp.tanh(linear(x_NxD, weight)) + 1  # type: ignore[arg-type]

        return jax.lax.fori_loop(0, count, body, x_NxD)

    lowered = jax.jit(tokens).lower(jnp.ones((rows, D)), weight, 4)
    held = lowered.compile(AS_SHIPPED).memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]
    assert held < 3 * weight.values_FxD.nbytes, held  # a block of two, or the partial sums

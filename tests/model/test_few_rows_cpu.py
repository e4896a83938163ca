"""The loops that read narrow weights on a CPU give the product, and widen no weight outside of them."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_SHIPPED

from mod_star.model import few_rows_cpu
from mod_star.model.few_rows_cpu import in_blocks, largest_divisor, one_row, rows_of, scaled
from mod_star.model.int8 import quantise
from mod_star.model.linear import linear

RNG = np.random.default_rng(0)


def test_the_largest_divisor_of_some_numbers() -> None:
    for number in range(1, 200):
        for most in (1, 7, 12, 16):
            assert largest_divisor(number, most) == max(n for n in range(1, most + 1) if number % n == 0)


def int8(inputs: int, outputs: int, groups: int) -> tuple[jax.Array, jax.Array]:
    values = RNG.integers(-127, 128, (inputs, outputs)).astype(np.int8)
    return jnp.asarray(values), jnp.asarray(RNG.uniform(0.5, 2, (groups, outputs)), jnp.float32)


def widened(values: jax.Array, scales: jax.Array) -> np.ndarray[Any, Any]:
    each = values.shape[0] // scales.shape[0]
    return np.asarray(values, np.float64) * np.repeat(np.asarray(scales, np.float64), each, 0)


def row(inputs: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(RNG.standard_normal((1, inputs)), dtype)


def near(product: jax.Array | None, exact: np.ndarray[Any, Any]) -> None:
    assert product is not None and product.dtype == jnp.float32
    np.testing.assert_allclose(product, exact, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(exact)))


@pytest.mark.parametrize(("inputs", "groups"), [(64, 1), (192, 3), (48, 3), (20, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_row_of_int8_weights_is_the_product_in_float64(inputs: int, groups: int, dtype: Any) -> None:
    weight, x = int8(inputs, 7, groups), row(inputs, dtype)
    near(jax.jit(one_row)(x, *weight), np.asarray(x, np.float64) @ widened(*weight))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 64), (24, 576)])
def test_one_row_of_16_bit_weights_is_the_product_in_float64(outputs: int, inputs: int, dtype: Any) -> None:
    weight, x = jnp.asarray(RNG.standard_normal((inputs, outputs)), dtype), row(inputs, dtype)
    near(jax.jit(one_row)(x, weight), np.asarray(x, np.float64) @ np.asarray(weight, np.float64))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 63])
def test_what_is_not_finite_stays_so(value: float, place: int) -> None:
    x = jnp.ones((1, 64)).at[0, place].set(value)
    product = jax.jit(one_row)(x, jnp.ones((64, 5), jnp.bfloat16))
    assert not np.isfinite(np.asarray(product)).any()


@pytest.mark.parametrize("block", [10**6, 6 * 16, 6 * 32, 16, 1])
@pytest.mark.parametrize("outputs", [1, 41])
def test_several_rows_are_the_product_in_float64(monkeypatch: pytest.MonkeyPatch, outputs: int, block: int) -> None:
    monkeypatch.setattr(few_rows_cpu, "BLOCK_BYTES", block * 4)  # of that many weights
    weight = int8(96, outputs, 6)
    x = jnp.asarray(RNG.standard_normal((3, 96)), jnp.float32).at[0, 0].set(np.nan)
    product = jax.jit(lambda *arrays: in_blocks(*arrays))(x, *weight)  # not the program of another block size
    near(product, np.asarray(x, np.float64) @ widened(*weight))


def test_stacked_weights_are_scaled_each_for_itself() -> None:
    each = [int8(96, 5, 6) for _ in range(2)]
    whole = scaled(*(jnp.stack(arrays) for arrays in zip(*each, strict=True)))
    np.testing.assert_allclose(whole, np.stack([widened(*weight) for weight in each]), rtol=1e-6)


def test_inputs_that_no_slice_divides_are_left_to_others() -> None:
    wide = jnp.asarray(RNG.integers(-9, 9, (34, 5)), jnp.float32)
    weight = quantise(wide, 1)
    assert one_row(jnp.ones((1, 34)), weight.values_DxF, weight.scales_GxF) is None
    np.testing.assert_allclose(linear(jnp.ones((1, 34)), weight), weight.widened().sum(0)[None], atol=1e-5)
    narrow = wide.astype(jnp.bfloat16)
    assert one_row(jnp.ones((1, 34)), narrow) is None
    product = jax.jit(linear)(jnp.ones((1, 34), jnp.bfloat16), narrow)
    np.testing.assert_array_equal(product, wide.sum(0)[None])


@pytest.mark.parametrize(("rows", "dtype"), [(1, "int8"), (2, "int8"), (1, "bfloat16")])
def test_a_loop_over_tokens_holds_no_widened_weight(rows: int, dtype: str) -> None:
    D = 768
    weight: Any = jnp.asarray(RNG.standard_normal((D, D)) / D, jnp.float32)
    weight = quantise(weight, 1) if dtype == "int8" else weight.astype(dtype)

    def tokens(x_NxD: jax.Array, weight: Any, count: int) -> jax.Array:
        def body(_: int, x_NxD: jax.Array) -> jax.Array:
            return jnp.tanh(linear(x_NxD, weight)) + jnp.ones((), x_NxD.dtype)

        return jax.lax.fori_loop(0, count, body, x_NxD)

    lowered = jax.jit(tokens).lower(jnp.ones((rows, D), "float32" if dtype == "int8" else dtype), weight, 4)
    held = lowered.compile(AS_SHIPPED).memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]
    assert held < 0.8 * D * D * (4 if rows > 1 else 1), held  # one of three blocks, or the partial sums


def test_a_weight_that_is_one_block_is_not_widened_before_the_loop_over_tokens() -> None:
    D = 256
    weight: Any = quantise(jnp.asarray(RNG.standard_normal((D, D)), jnp.float32), 1)
    assert D * D * 4 <= few_rows_cpu.BLOCK_BYTES

    def tokens(x_2xD: jax.Array, weight: Any, count: int) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, x_2xD: jnp.tanh(linear(x_2xD, weight)), x_2xD)

    program = jax.jit(tokens).lower(jnp.ones((2, D)), weight, 4).compile(AS_SHIPPED).as_text()
    loops = [line for line in (program or "").splitlines() if " while(" in line]
    carried = [
        math.prod(map(int, shape.split(","))) for line in loops for shape in re.findall(r"f32\[([\d,]+)\]", line)
    ]
    assert loops and max(carried) < D * D


def test_rows_of_a_16_bit_matrix_and_their_gradient() -> None:
    matrix, index = jnp.asarray(RNG.standard_normal((9, 4)), jnp.bfloat16), np.array([[3, -2], [30, 3]])
    weight, taken = RNG.integers(-9, 9, (2, 2, 4)), index.clip(0, 8)
    rows = lambda matrix: jax.vmap(lambda index: rows_of(matrix, index))(jnp.asarray(index))  # noqa: E731
    np.testing.assert_array_equal(jax.jit(rows)(matrix), np.asarray(matrix)[taken])
    expected = np.zeros((9, 4))
    np.add.at(expected, taken, weight)
    np.testing.assert_array_equal(jax.grad(lambda m: jnp.sum(rows(m) * weight))(matrix), expected)


def test_a_loop_over_tokens_copies_no_matrix_that_it_takes_rows_of() -> None:
    def tokens(matrix_VxD: jax.Array, token: jax.Array, count: int) -> jax.Array:
        def body(_: int, token: jax.Array) -> jax.Array:
            return token + jnp.sum(rows_of(matrix_VxD, token[None])).astype(jnp.int32)

        return jax.lax.fori_loop(0, count, body, token)

    matrix = jnp.zeros((1000, 64), jnp.bfloat16)
    held = jax.jit(tokens).lower(matrix, jnp.int32(0), 4).compile(AS_SHIPPED).memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]
    assert held < 0.1 * matrix.nbytes, held

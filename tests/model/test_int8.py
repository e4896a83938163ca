"""Int8 weights are as near as half a step, their products are those of the widened weights, and nothing is learned."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.model.int8 import Int8Weight, groups_of, quantise
from mod_star.model.layers import lookup
from mod_star.model.linear import linear

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("shape", "inputs", "groups", "options"),
    [
        ((128, 10), 1, 2, {}),
        ((3, 48, 4, 5), 1, 3, {"stacked": True}),
        ((3, 4, 5, 12), 2, 1, {"stacked": True}),
        ((11, 96), 1, 3, {"outputs_first": True}),
    ],
)
def test_every_weight_is_within_half_a_step_of_its_output_and_group(
    shape: tuple[int, ...], inputs: int, groups: int, options: dict[str, bool]
) -> None:
    own = shape[1:] if options.get("stacked") else shape
    weight = RNG.standard_normal((math.prod(shape) // math.prod(own), *own)).astype(np.float32)
    weight[:, 0] *= 100  # one output, or input, is larger than the others
    weight[..., 1] = 0  # one is without any weight
    quantised = quantise(jnp.asarray(weight.reshape(shape)), inputs, **options)
    assert quantised.shape == own and quantised.values_DxF.dtype == jnp.int8
    outputs_first = options.get("outputs_first", False)
    D = math.prod(own[1:] if outputs_first else own[:inputs])
    assert quantised.scales_GxF.shape[-2] == groups
    values = np.asarray(quantised.values_DxF, np.float64).reshape(len(weight), groups, D // groups, -1)
    scales = np.asarray(quantised.scales_GxF, np.float64).reshape(len(weight), groups, 1, -1)
    for stacked, q_GxSxF, s_Gx1xF in zip(weight.astype(np.float64), values, scales, strict=True):
        w_DxF = stacked.T if outputs_first else stacked.reshape(D, -1)
        w_GxSxF = w_DxF.reshape(q_GxSxF.shape)
        np.testing.assert_allclose(s_Gx1xF, np.abs(w_GxSxF).max(1, keepdims=True) / 127, rtol=1e-6)
        assert (np.abs(w_GxSxF - s_Gx1xF * q_GxSxF) <= s_Gx1xF / 2 * (1 + 1e-5)).all()
        assert np.abs(q_GxSxF).max() == 127
    whole = np.asarray(quantised.widened()).reshape(weight.shape)
    np.testing.assert_allclose(whole, weight, atol=scales.max() * 0.51)


@pytest.mark.parametrize(("inputs", "groups"), [(576, 9), (96, 3), (48, 3), (64, 1), (20, 1)])
def test_groups_are_of_64_inputs_or_fewer_or_there_is_one(inputs: int, groups: int) -> None:
    assert groups_of(inputs) == groups


def int8(shape: tuple[int, int], **options: bool) -> tuple[Int8Weight, np.ndarray[Any, Any]]:
    """A weight, and what it stands for in float64."""
    weight = quantise(jnp.asarray(RNG.standard_normal(shape), jnp.float32), 1, **options)
    values, scales = (np.asarray(array, np.float64) for array in (weight.values_DxF, weight.scales_GxF))
    wide = values * np.repeat(scales, len(values) // len(scales), 0)
    return weight, wide.T if weight.outputs_first else wide


@pytest.mark.parametrize("outputs_first", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_that_of_the_widened_weight(outputs_first: bool, transposed: bool) -> None:
    weight, wide = int8((96, 64), outputs_first=outputs_first)
    wide = wide.T if transposed else wide
    x = RNG.standard_normal((2, 3, wide.shape[0])).astype(np.float32)
    product = jax.jit(lambda x: jax.vmap(lambda x: linear(x, weight, transposed=transposed))(x))
    np.testing.assert_allclose(product(x), x.astype(np.float64) @ wide, rtol=1e-5, atol=1e-5 * np.abs(wide).max() * 8)
    narrow = jnp.asarray(x[0], jnp.bfloat16)
    exact = np.asarray(narrow, np.float64) @ wide
    call = partial(linear, dtype=jnp.float32, transposed=transposed)
    rounded = jax.jit(call)(narrow, weight)
    assert rounded.dtype == jnp.float32
    # Blocks of the weight are widened to float32; from outputs to inputs, or outside of programs, it is to bfloat16.
    near = 1e-5 if transposed == outputs_first else 2**-8
    np.testing.assert_allclose(rounded, exact, atol=near * np.abs(exact).max())
    np.testing.assert_allclose(call(narrow, weight), exact, atol=2**-8 * np.abs(exact).max())


def test_under_vmap_there_is_one_two_dimensional_product() -> None:
    weight, _ = int8((5, 6))
    traced = jax.jit(jax.vmap(lambda x: linear(x, weight))).trace(jnp.ones((4, 3, 5)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (dot,) = [line for line in text.splitlines() if "dot_general" in line]
    assert "(tensor<12x5xf32>, tensor<5x6xf32>)" in dot, dot


def test_a_weight_of_each_row_is_a_product_for_each() -> None:
    weights, _ = zip(*(int8((8, 5)) for _ in range(2)), strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    x = jnp.asarray(RNG.standard_normal((2, 3, 8)), jnp.float32)
    each = jnp.stack([linear(x[i], weights[i]) for i in range(2)])
    np.testing.assert_allclose(jax.vmap(linear)(x, stacked), each, rtol=1e-5)


def test_rows_of_an_embedding_are_scaled() -> None:
    embedding, wide = int8((7, 4), outputs_first=True)
    np.testing.assert_allclose(lookup(embedding, jnp.array([3, 0, 9])), wide[[3, 0, 6]], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: linear(jnp.ones((2, 3)), w), r"linear takes NxD and DxF, got \(2, 3\) and \(4, 6\) in int8"),
        (lambda w: w.reshape(6, -1), r"an int8 weight \(4, 6\) can only be reshaped to \(4, 6\), got \(6, -1\)"),
        (lambda w: jax.grad(lambda x: linear(x, w).sum())(jnp.ones((2, 4))), "int8 weights .* have no gradient"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(int8((4, 6))[0])

"""Int8 weights are as near as half a step, their products are those of the widened weights, and nothing is learned."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.model.int8 import Int8Weight, quantise
from mod_star.model.layers import lookup
from mod_star.model.linear import linear

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("shape", "inputs", "options"),
    [
        ((12, 10), 1, {}),
        ((3, 12, 4, 5), 1, {"stacked": True}),
        ((3, 4, 5, 12), 2, {"stacked": True}),
        ((11, 12), 1, {"outputs_first": True}),
    ],
)
def test_every_weight_is_within_half_a_step_of_its_channel(
    shape: tuple[int, ...], inputs: int, options: dict[str, bool]
) -> None:
    weight = RNG.standard_normal(shape).astype(np.float32)
    weight[..., 1] = 0  # an output, or an input, without any weight
    quantised = quantise(jnp.asarray(weight), inputs, **options)
    own = shape[1:] if options.get("stacked") else shape
    assert quantised.shape == own and quantised.values_FxD.dtype == jnp.int8
    groups = weight.reshape(-1, *own)
    values = np.asarray(quantised.values_FxD, np.float64).reshape(len(groups), *quantised.values_FxD.shape[-2:])
    scales = np.asarray(quantised.scales_F, np.float64).reshape(len(groups), -1)
    for group, q_FxD, s_F in zip(groups.astype(np.float64), values, scales, strict=True):
        w_FxD = group if options.get("outputs_first") else group.reshape(int(np.prod(own[:inputs])), -1).T
        np.testing.assert_allclose(s_F, np.abs(w_FxD).max(1) / 127, rtol=1e-6)
        assert (np.abs(w_FxD - s_F[:, None] * q_FxD) <= s_F[:, None] / 2 * (1 + 1e-5)).all()
        assert np.abs(q_FxD).max() == 127
    np.testing.assert_allclose(quantised.widened(), weight, atol=scales.max() * 0.51)


def int8(shape: tuple[int, int], **options: bool) -> tuple[Int8Weight, np.ndarray[Any, Any]]:
    """A weight, and what it stands for in float64."""
    weight = quantise(jnp.asarray(RNG.standard_normal(shape), jnp.float32), 1, **options)
    values, scales = np.asarray(weight.values_FxD, np.float64), np.asarray(weight.scales_F, np.float64)
    wide = values * scales[:, None]
    return weight, wide if weight.outputs_first else wide.T


@pytest.mark.parametrize("outputs_first", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_that_of_the_widened_weight(outputs_first: bool, transposed: bool) -> None:
    weight, wide = int8((96, 64), outputs_first=outputs_first)
    wide = wide.T if transposed else wide
    x = RNG.standard_normal((2, 3, wide.shape[0])).astype(np.float32)
    product = jax.jit(lambda x: jax.vmap(lambda x: linear(x, weight, transposed=transposed))(x))
    np.testing.assert_allclose(product(x), x.astype(np.float64) @ wide, rtol=1e-5, atol=1e-5 * np.abs(wide).max() * 8)
    rounded = linear(jnp.asarray(x[0], jnp.bfloat16), weight, jnp.float32, transposed=transposed)
    exact = np.asarray(jnp.asarray(x[0], jnp.bfloat16), np.float64) @ wide
    assert rounded.dtype == jnp.float32
    # Only where the scales are those of the inputs are these rounded once more.
    near = 1e-5 if transposed == outputs_first else 2**-8
    np.testing.assert_allclose(rounded, exact, atol=near * np.abs(exact).max())


def test_under_vmap_there_is_one_two_dimensional_product() -> None:
    weight, _ = int8((5, 6))
    traced = jax.jit(jax.vmap(lambda x: linear(x, weight))).trace(jnp.ones((4, 3, 5)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (dot,) = [line for line in text.splitlines() if "dot_general" in line]
    assert "(tensor<12x5xf32>, tensor<6x5xf32>)" in dot, dot


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

"""Grouped products against loops over rows in float64: values, gradients, `vmap`, and the way that TPUs compute."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mod_star.model.grouped import (
    block_size,
    grouped_linear,
    in_blocks,
    most_blocks,
    outer_in_blocks,
    outer_ragged,
    ragged,
)

HIGHEST = jax.lax.Precision.HIGHEST


def arrays(rows: int, groups: int, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """x, weights, y and groups, two of them of nobody; float32 values that float64 holds exactly."""
    rng = np.random.default_rng(seed)
    x, weights, y = (rng.normal(size=s).astype(np.float32) for s in ((rows, 5), (groups, 5, 7), (rows, 7)))
    group = rng.integers(-1, groups + 1, rows).astype(np.int32)
    return jnp.asarray(x), jnp.asarray(weights), jnp.asarray(y), jnp.asarray(group)


def naive(x: Any, weights: Any, group: Any) -> Any:
    """One row after the other."""
    x, weights = (np.asarray(a, np.float64) for a in (x, weights))
    rows = [r @ weights[g] if 0 <= g < len(weights) else np.zeros(7) for r, g in zip(x, group, strict=True)]
    return np.stack(rows)


def naive_back(y: Any, weights: Any, group: Any) -> Any:
    y, weights = (np.asarray(a, np.float64) for a in (y, weights))
    return np.stack([weights[g] @ r if 0 <= g < len(weights) else np.zeros(5) for r, g in zip(y, group, strict=True)])


def naive_outer(x: Any, y: Any, group: Any, groups: int) -> Any:
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    sums = np.zeros((groups, x.shape[1], y.shape[1]))
    for r, s, g in zip(x, y, group, strict=True):
        if 0 <= g < groups:
            sums[g] += np.outer(r, s)
    return sums


@pytest.mark.parametrize(("rows", "groups"), [(1, 3), (70, 3)])
@pytest.mark.parametrize(("product", "outer"), [(in_blocks, outer_in_blocks), (ragged, outer_ragged)])
def test_both_ways_multiply_each_row_by_the_matrix_of_its_group(
    product: Any, outer: Any, rows: int, groups: int
) -> None:
    x, weights, y, group = arrays(rows, groups)
    result = product(x, weights, group, transposed=False, precision=HIGHEST)
    np.testing.assert_allclose(result, naive(x, weights, group), atol=1e-5)
    back = product(y, weights, group, transposed=True, precision=HIGHEST)
    np.testing.assert_allclose(back, naive_back(y, weights, group), atol=1e-5)
    sums = outer(x, y, group, groups=groups, precision=HIGHEST)
    np.testing.assert_allclose(sums, naive_outer(x, y, group, groups), atol=2e-5)


@pytest.mark.parametrize("group", [[0] * 9, [2] * 9, [-1] * 9, [3] * 9, [0, 1, 2] * 3])
def test_groups_of_any_size_even_none(group: list[int]) -> None:
    x, weights, y, _ = arrays(9, 3)
    ids = jnp.asarray(group, jnp.int32)
    np.testing.assert_allclose(grouped_linear(x, weights, ids), naive(x, weights, ids), atol=1e-5)
    sums = outer_in_blocks(x, y, ids, groups=3, precision=HIGHEST)
    np.testing.assert_allclose(sums, naive_outer(x, y, ids, 3), atol=1e-5)


def test_there_is_room_for_as_many_blocks_as_rows_can_make() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, groups = int(rng.integers(1, 300)), int(rng.integers(1, 9))
        size = block_size(rows, groups)
        counts = np.bincount(rng.choice(groups, rows, p=rng.dirichlet(np.full(groups, 0.3))), minlength=groups)
        assert -(-counts // size).sum() <= most_blocks(rows, groups, size)
    assert most_blocks(8, 4, 4) == 5  # 5, 1, 1, 1


def test_gradients_of_both_orders() -> None:
    x, weights, _, group = arrays(12, 3)
    check_grads(lambda x, w: jnp.sin(grouped_linear(x, w, group)), (x, weights), order=2, rtol=2e-2)


def test_a_batch_is_more_rows_of_the_same_groups() -> None:
    x, weights, _, group = arrays(12, 3)
    batched = jax.vmap(jax.vmap(grouped_linear, (0, None, 0)), (0, None, 0))
    x, group = x.reshape(2, 2, 3, 5), group.reshape(2, 2, 3)
    expected = naive(x.reshape(12, 5), weights, group.reshape(12)).reshape(2, 2, 3, 7)
    np.testing.assert_allclose(batched(x, weights, group), expected, atol=1e-5)
    text = str(jax.make_jaxpr(jax.grad(lambda w: jnp.sum(batched(x, w, group))))(weights))
    assert text.count("grouped_outer") == 1
    assert "f32[2,2,3,5,7]" not in text and "f32[2,3,5,7]" not in text, "a gradient of all weights per sequence"


def test_weights_of_its_own_for_each_of_a_batch() -> None:
    x, weights, y, group = arrays(12, 4)
    x, weights, group = x.reshape(2, 6, 5), weights.reshape(2, 2, 5, 7), group.reshape(2, 6)
    expected = np.stack([naive(*each) for each in zip(x, weights, group, strict=True)])
    np.testing.assert_allclose(jax.vmap(grouped_linear)(x, weights, group), expected, atol=1e-5)

    def pull(x: Any, w: Any, g: Any, y: Any) -> Any:
        return jax.vjp(lambda w: grouped_linear(x, w, g), w)[1](y)[0]

    grads = jax.vmap(pull, (0, None, 0, 0))(x, weights[0], group, y.reshape(2, 6, 7))
    outers = [naive_outer(a, b, g, 2) for a, b, g in zip(x, y.reshape(2, 6, 7), group, strict=True)]
    np.testing.assert_allclose(grads, np.stack(outers), atol=1e-5)


def test_16_bit_rows_are_summed_in_float32() -> None:
    x, weights, _, group = arrays(40, 3)
    x, weights = (jnp.asarray(a, jnp.bfloat16) for a in (x, weights))
    result = grouped_linear(x, weights, group)
    expected = naive(np.asarray(x, np.float32), np.asarray(weights, np.float32), group)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("shapes", [((4, 5), (2, 6, 3)), ((4,), (2, 5, 3)), ((4, 5), (5, 3))])
def test_other_shapes_are_refused(shapes: Any) -> None:
    x, weights = map(jnp.zeros, shapes)
    with pytest.raises(TypeError, match="grouped_linear takes RxD and GxDxF"):
        grouped_linear(x, weights, jnp.zeros(4, jnp.int32))

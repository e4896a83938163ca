"""Products of few rows with int8 weights on a CPU, which widen weights in a register or in the cache.

XLA:CPU multiplies by int8 weights by widening the whole matrix in memory first, which takes longer than reading it in
float32. A sum over inputs fused with the widening is no better: XLA writes it as a loop over single elements.

One row: the inputs are cut into at most `TERMS` slices of L, and the products of all slices are added up element by
element: one loop over FxL partial sums, which loads, widens, multiplies and adds vectors. A product with ones, which
XLA does not fuse, adds up the L partial sums of each output. Each weight is read once.

Several rows: a block of the outputs after the other is widened into the cache and multiplied there. For `MANY_ROWS`, as
prompts have, the whole matrix is widened in memory.

docs/results/speed_decoding.md has the measurements.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LANES = 32
"""Slices are a multiple of this long."""
TERMS = 12
"""Slices that the sum is written out in, at most: the time to compile grows with them, and the partial sums shrink."""
BLOCK_BYTES = 2**20
"""Of the weights that are widened at a time, in float32."""
MANY_ROWS = 64
"""From which on a product takes so long that widening the whole matrix before it counts little."""


def slice_size(inputs: int) -> int | None:
    """The length of the slices that this many inputs are cut into; None: there is none that divides them."""
    sizes = range(LANES, inputs + 1, LANES)
    return next((size for size in sizes if inputs % size == 0 and inputs // size <= TERMS), None)


def one_row(x_1xD: jax.Array, values_FxD: jax.Array) -> jax.Array | None:
    """x @ values.T, float32 1xF; None where D cannot be cut into slices.

    Args:
      x_1xD: a row, of any floating type.
      values_FxD: int8.
    """
    F, D = values_FxD.shape
    size = slice_size(D)
    if size is None:
        return None
    x_D = jax.lax.optimization_barrier(x_1xD.astype(jnp.float32)).reshape(-1)  # computed once, not for each weight
    start = _zero_at_run_time(x_D)
    total_FxL: jax.Array | None = None
    for first in range(0, D, size):
        weights_FxL = jax.lax.dynamic_slice(values_FxD, (0, start + first), (F, size)).astype(jnp.float32)
        products_FxL = x_D[first : first + size] * weights_FxL
        total_FxL = products_FxL if total_FxL is None else total_FxL + products_FxL
    assert total_FxL is not None
    return (total_FxL @ jnp.ones(size, jnp.float32))[None]


def in_blocks(x_NxD: jax.Array, values_FxD: jax.Array) -> jax.Array:
    """x @ values.T, float32 NxF. There are at least two blocks: what one would widen, XLA would keep for all tokens.

    Args:
      x_NxD: rows, of any floating type.
      values_FxD: int8.
    """
    F, D = values_FxD.shape
    x_NxD = x_NxD.astype(jnp.float32)
    size = -(-F // max(2, -(-F * D * 4 // BLOCK_BYTES)))

    def block(i: jax.Array, sums_NxF: jax.Array) -> jax.Array:
        start = jnp.minimum(i * size, F - size)  # the last block computes some of the one before again
        weights = jax.lax.dynamic_slice(values_FxD, (start, 0), (size, D)).astype(jnp.float32)
        sums = jax.lax.dot_general(x_NxD, weights, (((1,), (1,)), ((), ())), precision="highest")
        return jax.lax.dynamic_update_slice(sums_NxF, sums, (0, start))

    return jax.lax.fori_loop(0, -(-F // size), block, jnp.zeros((x_NxD.shape[0], F), jnp.float32))


def _zero_at_run_time(x_D: jax.Array) -> jax.Array:
    """int32 0; 1 where the first element is NaN, as all sums are then in any case.

    Slices start there. Where XLA knew the start, it would widen them before the loop over tokens, and keep them.
    """
    return (x_D[0] != x_D[0]).astype(jnp.int32)

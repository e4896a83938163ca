"""Products of few rows with weights in 8 or 16 bits on a CPU, which widen weights in a register or in the cache.

A decoding step of few rows spends its time reading weights, so fewer bits should make it faster. XLA:CPU widens a whole
matrix of int8 weights in memory first, which takes longer than reading it in float32, and its 16-bit products read half
as many bytes a second as the machine can. A sum over inputs fused with the widening is no better: XLA writes it as a
loop over single elements.

One row: the inputs are cut into a few slices, and the products of all slices are added up element by element: one loop
over partial sums, which loads, widens, multiplies and adds vectors. A product with ones, which XLA does not fuse, adds
up the partial sums of each output. Each weight is read once.

Several rows, of int8 weights: a block of the weight after the other is widened into the cache and multiplied there.
For `MANY_ROWS`, as prompts have, the whole matrix is widened in memory.

A barrier ties weights to the rows. Else XLA would widen them before the loop over tokens, and keep them, or a copy.

docs/results/speed_decoding.md has the measurements.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

FEWEST_TERMS, MOST_TERMS, MOST_TERMS_OF_INT8 = 4, 12, 16
"""Slices that the sum is written out in. The more, the longer compiling takes, and the fewer are the partial sums. From
16 terms on, XLA's loop over 16-bit weights is no longer one of vectors."""
BLOCK_BYTES = 2**20
"""Of the weights that are widened at a time, in float32."""
MANY_ROWS = 64
"""From which on a product takes so long that widening the whole matrix before it counts little."""


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def one_row(x_1xD: jax.Array, weight_DxF: jax.Array, scales_GxF: jax.Array | None = None) -> jax.Array | None:
    """x @ weight, added up in float32: float32 1xF; None where the inputs cannot be cut into slices.

    Args:
      x_1xD: a row, of any floating type.
      weight_DxF: int8, or of a 16-bit floating type.
      scales_GxF: float32, of each G-th part of the inputs; None: the weight has none.
    """
    D, F = weight_DxF.shape
    G = 1 if scales_GxF is None else len(scales_GxF)
    terms = largest_divisor(D // G, MOST_TERMS if scales_GxF is None else MOST_TERMS_OF_INT8)
    if terms < FEWEST_TERMS:
        return None
    x_1xD, weight_DxF, scales_GxF = jax.lax.optimization_barrier((x_1xD.astype(jnp.float32), weight_DxF, scales_GxF))
    x_GxTxL = x_1xD.reshape(G, terms, -1)
    bits_GxTxLxF = _bits(weight_DxF).reshape(G, terms, -1, F)
    parts = (x_GxTxL[:, t, :, None] * _widened(bits_GxTxLxF[:, t], weight_DxF.dtype) for t in range(terms))
    total_GxLxF = _added_up(parts)
    if scales_GxF is not None:
        total_GxLxF *= scales_GxF[:, None]
    return jnp.ones((1, D // terms), jnp.float32) @ total_GxLxF.reshape(-1, F)


def in_blocks(x_NxD: jax.Array, values_DxF: jax.Array, scales_GxF: jax.Array) -> jax.Array:
    """x @ weight, float32 NxF, for int8 values and the scales of each G-th part of the inputs.

    Args:
      x_NxD: rows, of any floating type.
      values_DxF: int8.
      scales_GxF: float32.
    """
    (N, D), (G, F) = x_NxD.shape, scales_GxF.shape
    x, values, scales = jax.lax.optimization_barrier((x_NxD.astype(jnp.float32), values_DxF, scales_GxF))
    outputs = min(F, max(1, BLOCK_BYTES * G // (4 * D)))
    groups = largest_divisor(G, max(1, BLOCK_BYTES * G // (4 * D * outputs)))
    inputs = groups * D // G

    def of_outputs(i: jax.Array, sums_NxF: jax.Array) -> jax.Array:
        start = jnp.minimum(i * outputs, F - outputs)  # the last block computes some of the one before again

        def of_inputs(k: jax.Array, sums: jax.Array) -> jax.Array:
            own = jax.lax.dynamic_slice(values, (k * inputs, start), (inputs, outputs))
            own_scales = jax.lax.dynamic_slice(scales, (k * groups, start), (groups, outputs))
            rows = jax.lax.dynamic_slice(x, (0, k * inputs), (N, inputs))
            return sums + jnp.matmul(rows, scaled(own, own_scales), precision="highest")

        sums = jax.lax.fori_loop(0, G // groups, of_inputs, jnp.zeros((N, outputs), jnp.float32))
        return jax.lax.dynamic_update_slice(sums_NxF, sums, (0, start))

    return jax.lax.fori_loop(0, -(-F // outputs), of_outputs, jnp.zeros((N, F), jnp.float32))


def scaled(values_DxF: jax.Array, scales_GxF: jax.Array) -> jax.Array:
    """The weight in float32: values times the scales of each G-th part of the inputs. Both may have leading axes."""
    *stack, G, F = scales_GxF.shape
    weight = values_DxF.reshape(*stack, G, -1, F).astype(jnp.float32) * scales_GxF[..., None, :]
    return weight.reshape(values_DxF.shape)


def rows_of(matrix_VxD: jax.Array, index_N: jax.Array) -> jax.Array:
    """Rows NxD of a matrix. An index beyond its last row gets that one, a negative one the first.

    XLA's CPU compiler widens the whole of a 16-bit floating type to gather rows of it, and in a loop keeps that copy;
    so a CPU gathers its bits. A barrier keeps a loop from copying these, too.
    """
    if matrix_VxD.dtype.itemsize != 2:
        return _gathered(matrix_VxD, index_N)
    return jax.lax.platform_dependent(matrix_VxD, index_N, cpu=_gathered_bits, default=_gathered)


def _gathered(matrix_VxD: jax.Array, index_N: jax.Array) -> jax.Array:
    return jnp.take(matrix_VxD, index_N, axis=0, mode="clip")


@jax.custom_jvp
def _gathered_bits(matrix_VxD: jax.Array, index_N: jax.Array) -> jax.Array:
    matrix_VxD, index_N = jax.lax.optimization_barrier((matrix_VxD, index_N))
    bits = jax.lax.bitcast_convert_type(matrix_VxD, jnp.uint16)
    return jax.lax.bitcast_convert_type(_gathered(bits, index_N), matrix_VxD.dtype)


@_gathered_bits.defjvp
def _gathered_bits_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    return _gathered_bits(*primals), _gathered(tangents[0], primals[1])


def _bits(weight: jax.Array) -> jax.Array:
    """A weight as XLA:CPU can slice it: it widens the whole of a 16-bit floating type to do so."""
    return weight if weight.dtype == jnp.int8 else jax.lax.bitcast_convert_type(weight, jnp.uint16)


def _widened(bits: jax.Array, dtype: Any) -> jax.Array:
    """Weights in float32, from the bits that hold them as `dtype`."""
    if dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    return (bits if dtype == jnp.int8 else jax.lax.bitcast_convert_type(bits, dtype)).astype(jnp.float32)


def _added_up(parts: Iterable[jax.Array]) -> jax.Array:
    """The sum; `sum` would begin with 0, which is one more term."""
    return functools.reduce(operator.add, parts)

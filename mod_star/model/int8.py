"""Weights of matrix products in 8 bits, with a scale per output channel: what decoding reads is a quarter as large.

W[d, f] ≈ s[f]·q[d, f] with whole numbers q from -127 to 127 and s[f] = max_d |W[d, f]| / 127, so that
|W[d, f] - s[f]·q[d, f]| ≤ s[f] / 2. Inputs are not rounded: the product widens q to their type, adds up in float32 and
scales the sums. Nothing here is differentiable.

An `Int8Weight` stands where the float array stood in a model's params, and has as much of an array's interface as the
network uses, so that the network does not know.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mod_star.model.int8_cpu import MANY_ROWS, in_blocks, one_row
from mod_star.model.precision import precision_of

LARGEST = 127
"""q lies in [-LARGEST, LARGEST]."""


@struct.dataclass
class Int8Weight:
    """A quantised weight. Stacked weights have leading axes in both arrays, which the shapes below leave out."""

    values_FxD: jax.Array
    """int8 q: F outputs, each with its D inputs beside one another."""
    scales_F: jax.Array
    """float32 s."""
    inputs: tuple[int, ...] = struct.field(pytree_node=False)
    """Axes of the inputs, whose product is D."""
    outputs: tuple[int, ...] = struct.field(pytree_node=False)
    """Axes of the outputs, whose product is F."""
    outputs_first: bool = struct.field(pytree_node=False)
    """The weight is outputs x inputs, as an embedding is that serves as LM head; else inputs x outputs."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this one stands for."""
        return self.outputs + self.inputs if self.outputs_first else self.inputs + self.outputs

    @property
    def ndim(self) -> int:
        """Axes of that weight."""
        return len(self.shape)

    def astype(self, dtype: Any) -> Int8Weight:
        """Itself: a product widens it to the type of the other operand."""
        del dtype
        return self

    def reshape(self, *shape: int) -> Int8Weight:
        """As the matrix DxF, or FxD; of such a pair of sizes one may be -1.

        Raises:
          TypeError: another shape.
        """
        matrix = (math.prod(self.inputs), math.prod(self.outputs))
        matrix = matrix[::-1] if self.outputs_first else matrix
        fits = len(shape) == 2 and shape != (-1, -1) and all(n in (-1, m) for n, m in zip(shape, matrix, strict=True))
        if not fits:
            raise TypeError(f"an int8 weight {self.shape} can only be reshaped to {matrix}, got {shape}")
        return replace(self, inputs=(math.prod(self.inputs),), outputs=(math.prod(self.outputs),))

    def widened(self) -> jax.Array:
        """The weight in float32, s·q, in its shape; stacked weights keep their leading axes."""
        weight = self.values_FxD.astype(jnp.float32) * self.scales_F[..., None]
        weight = weight if self.outputs_first else jnp.swapaxes(weight, -1, -2)
        return weight.reshape(*self.scales_F.shape[:-1], *self.shape)


def quantise(weight: jax.Array, inputs: int, *, outputs_first: bool = False, stacked: bool = False) -> Int8Weight:
    """A weight in 8 bits.

    Args:
      weight: inputs x outputs, each of any number of axes, of a floating type.
      inputs: how many of the axes are inputs.
      outputs_first: the weight is outputs x inputs.
      stacked: it has one more axis before these, of weights that are quantised each for itself.
    """
    shape = weight.shape[int(stacked) :]
    first = len(shape) - inputs if outputs_first else inputs
    before, after = shape[:first], shape[first:]
    matrix = weight.reshape(*weight.shape[: int(stacked)], math.prod(before), math.prod(after))
    values, scales = _quantised(matrix if outputs_first else jnp.swapaxes(matrix, -1, -2))
    return Int8Weight(values, scales, *((after, before) if outputs_first else (before, after)), outputs_first)


@jax.jit
def _quantised(weight_FxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q and s of a weight whose last axis is that of its inputs; an output without any weight but 0 has the scale 0."""
    weight_FxD = weight_FxD.astype(jnp.float32)
    scales_F = jnp.max(jnp.abs(weight_FxD), -1) / LARGEST
    steps_FxD = weight_FxD / jnp.where(scales_F > 0, scales_F, 1)[..., None]
    return jnp.clip(jnp.round(steps_FxD), -LARGEST, LARGEST).astype(jnp.int8), scales_F


def int8_linear(
    x_NxD: jax.Array,
    weight: Int8Weight,
    dtype: Any = None,
    *,
    transposed: bool = False,
    precision: str | None = None,
) -> jax.Array:
    """`mod_star.model.linear.linear` for an `Int8Weight`: x @ weight, NxF, or x @ weight.T where `transposed`."""
    if weight.ndim != 2 or x_NxD.ndim != 2 or x_NxD.shape[1] != weight.shape[-1 if transposed else 0]:
        expected = "NxD and FxD" if transposed else "NxD and DxF"
        raise TypeError(f"linear takes {expected}, got {x_NxD.shape} and {weight.shape} in int8")
    dtype = x_NxD.dtype if dtype is None else dtype
    params = {"precision": precision_of(x_NxD.dtype, precision)}
    if transposed == weight.outputs_first:
        sums_NxF = int8_product_p.bind(x_NxD, weight.values_FxD, inner=1, **params)
        return (sums_NxF * weight.scales_F).astype(dtype)
    scaled = (x_NxD.astype(jnp.float32) * weight.scales_F).astype(x_NxD.dtype)
    product: jax.Array = int8_product_p.bind(scaled, weight.values_FxD, inner=0, **params)
    return product.astype(dtype)


int8_product_p = Primitive("int8_product")
"""Float32 products of rows and the int8 values alone, contracted over their axis `inner`. A primitive so that `vmap`
makes more rows of a batch, as of `linear`, and so that each platform has a form of its own."""


def _product(x: jax.Array, values: jax.Array, *, inner: int, precision: Any) -> jax.Array:
    """Widened as a whole to the type of the rows, which both 16-bit types and float32 do exactly."""
    dimensions = (((1,), (inner,)), ((), ()))
    wide = values.astype(x.dtype)
    return jax.lax.dot_general(x, wide, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _product_on_cpu(x: jax.Array, values: jax.Array, *, inner: int, precision: Any) -> jax.Array:
    if inner == 0 or x.shape[0] >= MANY_ROWS:  # 0: only the mean embedding of a latent thought is such a product
        return _product(x, values, inner=inner, precision=precision)
    in_one_pass = one_row(x, values) if x.shape[0] == 1 else None
    return in_blocks(x, values) if in_one_pass is None else in_one_pass


def _shape(x: ShapedArray, values: ShapedArray, *, inner: int, precision: Any) -> ShapedArray:
    del precision
    return ShapedArray((x.shape[0], values.shape[1 - inner]), jnp.dtype(jnp.float32))


def _batch(operands: tuple[jax.Array, jax.Array], dims: tuple[Any, Any], **params: Any) -> tuple[jax.Array, int]:
    (x, values), (x_dim, values_dim) = operands, dims
    if values_dim is None:
        x = jnp.moveaxis(x, x_dim, 0)
        rows = int8_product_p.bind(x.reshape(-1, x.shape[-1]), values, **params)
        return rows.reshape(*x.shape[:2], -1), 0
    return jax.vmap(lambda x, values: _product(x, values, **params), (x_dim, values_dim))(x, values), 0


def _no_gradient(primals: Any, tangents: Any, **params: Any) -> Any:
    del primals, tangents, params
    raise TypeError("int8 weights are for generating and scoring: they have no gradient; load the run without them")


int8_product_p.def_impl(functools.partial(jax.jit, static_argnames=("inner", "precision"))(_product))
int8_product_p.def_abstract_eval(_shape)
mlir.register_lowering(int8_product_p, mlir.lower_fun(_product, multiple_results=False))
mlir.register_lowering(int8_product_p, mlir.lower_fun(_product_on_cpu, multiple_results=False), platform="cpu")
batching.primitive_batchers[int8_product_p] = _batch
ad.primitive_jvps[int8_product_p] = _no_gradient

"""Weights of matrix products in 8 bits, with a scale per output and group of inputs: decoding reads a quarter as much.

W[d, f] ≈ s[g, f]·q[d, f] with whole numbers q from -127 to 127, where g is the group of d: `GROUP` inputs in a row, as
in the blocks of GGUF's Q8_0. s[g, f] = max |W[d, f]| / 127 over the group's inputs d, so that
|W[d, f] - s[g, f]·q[d, f]| ≤ s[g, f] / 2. Inputs are not rounded, and products are added up in float32. Nothing here is
differentiable.

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

from mod_star.model.few_rows_cpu import MANY_ROWS, in_blocks, one_row, scaled
from mod_star.model.precision import precision_of

LARGEST = 127
"""q lies in [-LARGEST, LARGEST]."""
GROUP = 64
"""Inputs that share a scale."""


@struct.dataclass
class Int8Weight:
    """A quantised weight. Stacked weights have leading axes in both arrays, which the shapes below leave out."""

    values_DxF: jax.Array
    """int8 q, D inputs and F outputs."""
    scales_GxF: jax.Array
    """float32 s, of G groups of inputs."""
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
        weight = scaled(self.values_DxF, self.scales_GxF)
        weight = jnp.swapaxes(weight, -1, -2) if self.outputs_first else weight
        return weight.reshape(*self.scales_GxF.shape[:-2], *self.shape)


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
    values, scales = _quantised(jnp.swapaxes(matrix, -1, -2) if outputs_first else matrix)
    return Int8Weight(values, scales, *((after, before) if outputs_first else (before, after)), outputs_first)


def groups_of(inputs: int) -> int:
    """Groups that so many inputs are divided into: of `GROUP`, or 32 or 16 where that divides them, else one."""
    return next((inputs // size for size in (GROUP, 32, 16) if inputs % size == 0), 1)


@jax.jit
def _quantised(weight_DxF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q and s of a weight, which may have leading axes; a group without any weight but 0 has the scale 0."""
    *stack, D, F = weight_DxF.shape
    weight_GxSxF = weight_DxF.astype(jnp.float32).reshape(*stack, groups_of(D), -1, F)
    scales_GxF = jnp.max(jnp.abs(weight_GxSxF), -2) / LARGEST
    steps_GxSxF = weight_GxSxF / jnp.where(scales_GxF > 0, scales_GxF, 1)[..., None, :]
    values = jnp.clip(jnp.round(steps_GxSxF), -LARGEST, LARGEST).astype(jnp.int8)
    return values.reshape(weight_DxF.shape), scales_GxF


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
    params["backward"] = transposed != weight.outputs_first
    product: jax.Array = int8_product_p.bind(x_NxD, weight.values_DxF, weight.scales_GxF, **params)
    return product.astype(dtype)


int8_product_p = Primitive("int8_product")
"""Float32 products of rows with int8 values and their scales; `backward`: with the transposed weight, from outputs to
inputs. A primitive so that `vmap` makes more rows of a batch, as of `linear`, and so that each platform has a form of
its own."""


def _product(x: jax.Array, values: jax.Array, scales: jax.Array, *, backward: bool, precision: Any) -> jax.Array:
    """Widened as a whole to the type of the rows."""
    dimensions = (((1,), (int(backward),)), ((), ()))
    wide = scaled(values, scales).astype(x.dtype)
    return jax.lax.dot_general(x, wide, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _product_on_cpu(x: jax.Array, values: jax.Array, scales: jax.Array, *, backward: bool, precision: Any) -> jax.Array:
    if backward or x.shape[0] >= MANY_ROWS:  # only the mean embedding of a latent thought is a backward product
        return _product(x, values, scales, backward=backward, precision=precision)
    in_one_pass = one_row(x, values, scales) if x.shape[0] == 1 else None
    return in_blocks(x, values, scales) if in_one_pass is None else in_one_pass


def _shape(x: ShapedArray, values: ShapedArray, scales: ShapedArray, *, backward: bool, precision: Any) -> ShapedArray:
    del scales, precision
    return ShapedArray((x.shape[0], values.shape[0 if backward else 1]), jnp.dtype(jnp.float32))


def _batch(operands: tuple[jax.Array, ...], dims: tuple[Any, ...], **params: Any) -> tuple[jax.Array, int]:
    if dims[1:] == (None, None):
        x = jnp.moveaxis(operands[0], dims[0], 0)
        rows = int8_product_p.bind(x.reshape(-1, x.shape[-1]), *operands[1:], **params)
        return rows.reshape(*x.shape[:2], -1), 0
    return jax.vmap(functools.partial(_product, **params), dims)(*operands), 0


def _no_gradient(primals: Any, tangents: Any, **params: Any) -> Any:
    del primals, tangents, params
    raise TypeError("int8 weights are for generating and scoring: they have no gradient; load the run without them")


int8_product_p.def_impl(functools.partial(jax.jit, static_argnames=("backward", "precision"))(_product))
int8_product_p.def_abstract_eval(_shape)
mlir.register_lowering(int8_product_p, mlir.lower_fun(_product, multiple_results=False))
mlir.register_lowering(int8_product_p, mlir.lower_fun(_product_on_cpu, multiple_results=False), platform="cpu")
batching.primitive_batchers[int8_product_p] = _batch
ad.primitive_jvps[int8_product_p] = _no_gradient

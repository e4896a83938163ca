"""`linear(x, weight)`: a matrix product that stays two-dimensional under `vmap`.

The network is written for one sequence and `vmap`ped. Left to itself, `vmap` turns x·W into a three-dimensional
product, and the gradient of W into a contraction over two axes that XLA:CPU does by transposing activations first: the
gradient of a feed-forward layer takes 1.6 times as long (experiments/bench_linear.py). `linear` is a JAX primitive with
one rule of its own: a batch of inputs becomes more rows, however deep `vmap`s are nested. A primitive, because
`custom_vmap` cannot be differentiated once no `vmap` is left around it.

The product itself is asked for in float32 and then rounded, which is what accelerators do inside, and what makes
XLA:CPU use its 16-bit kernels at all.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

linear_p = Primitive("linear")
ROWS_AT_LEAST = 8
"""Rows that a 16-bit product is padded to on a CPU."""


def linear(x_NxD: jax.Array, weight_DxF: jax.Array, dtype: Any = None) -> jax.Array:
    """x @ weight, NxF, accumulated in float32; also differentiable and vmappable.

    Args:
      x_NxD: rows.
      weight_DxF: of the same type.
      dtype: of the result; None: that of x.
    """
    if x_NxD.ndim != 2 or weight_DxF.ndim != 2 or x_NxD.shape[1] != weight_DxF.shape[0]:
        raise TypeError(f"linear takes NxD and DxF, got {x_NxD.shape} and {weight_DxF.shape}")
    if x_NxD.dtype != weight_DxF.dtype:
        raise TypeError(f"linear takes two arrays of one type, got {x_NxD.dtype} and {weight_DxF.dtype}")
    return linear_p.bind(x_NxD, weight_DxF, dtype=jnp.dtype(x_NxD.dtype if dtype is None else dtype))


def _product(x: jax.Array, weight: jax.Array, *, dtype: Any, contracting: tuple[int, int] = (1, 0)) -> jax.Array:
    dimensions = (((contracting[0],), (contracting[1],)), ((), ()))
    return jax.lax.dot_general(x, weight, dimensions, preferred_element_type=jnp.float32).astype(dtype)


def _product_on_cpu(x: jax.Array, weight: jax.Array, *, dtype: Any) -> jax.Array:
    """XLA:CPU multiplies a single 16-bit row by converting the whole weight to float32 first: ten times eight rows."""
    rows = x.shape[0]
    if x.dtype == jnp.float32 or rows >= ROWS_AT_LEAST:
        return _product(x, weight, dtype=dtype)
    return _product(jnp.pad(x, ((0, ROWS_AT_LEAST - rows), (0, 0))), weight, dtype=dtype)[:rows]


def _batch(operands: tuple[jax.Array, jax.Array], dims: tuple[Any, Any], *, dtype: Any) -> tuple[jax.Array, int]:
    (x, weight), (x_dim, weight_dim) = operands, dims
    if weight_dim is None:
        x = jnp.moveaxis(x, x_dim, 0)
        rows = linear(x.reshape(-1, x.shape[-1]), weight, dtype)
        return rows.reshape(*x.shape[:2], -1), 0
    return jax.vmap(functools.partial(_product, dtype=dtype), (x_dim, weight_dim))(x, weight), 0


def _gradient_of_x(grad: jax.Array, x: Any, weight: jax.Array, *, dtype: Any) -> jax.Array:
    del dtype
    return linear(grad.astype(weight.dtype), weight.T, x.aval.dtype)


def _gradient_of_weight(grad: jax.Array, x: jax.Array, weight: Any, *, dtype: Any) -> jax.Array:
    del dtype
    return _product(x, grad.astype(x.dtype), dtype=weight.aval.dtype, contracting=(0, 0))


linear_p.def_impl(functools.partial(jax.jit, static_argnames="dtype")(_product))
linear_p.def_abstract_eval(lambda x, weight, *, dtype: ShapedArray((x.shape[0], weight.shape[1]), dtype))
mlir.register_lowering(linear_p, mlir.lower_fun(_product, multiple_results=False))
mlir.register_lowering(linear_p, mlir.lower_fun(_product_on_cpu, multiple_results=False), platform="cpu")
batching.primitive_batchers[linear_p] = _batch
ad.defbilinear(linear_p, _gradient_of_x, _gradient_of_weight)


def linear_saveable(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """A `jax.checkpoint` policy: keep the results of `linear`, recompute the rest."""
    return primitive is linear_p

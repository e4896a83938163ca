"""`linear(x, weight)`: a matrix product that stays two-dimensional under `vmap`.

The network is written for one sequence and `vmap`ped. Left to itself, `vmap` turns x·W into a three-dimensional
product, and the gradient of W into a contraction over two axes that XLA:CPU does by transposing activations first: the
gradient of a feed-forward layer takes 1.6 times as long (experiments/bench_linear.py). `linear` is a JAX primitive with
one rule of its own: a batch of inputs becomes more rows, however deep `vmap`s are nested. A primitive, because
`custom_vmap` cannot be differentiated once no `vmap` is left around it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

linear_p = Primitive("linear")


def linear(x_NxD: jax.Array, weight_DxF: jax.Array) -> jax.Array:
    """x @ weight, NxF. Both must have the same type, which is the result's; also differentiable and vmappable."""
    if x_NxD.ndim != 2 or weight_DxF.ndim != 2 or x_NxD.shape[1] != weight_DxF.shape[0]:
        raise TypeError(f"linear takes NxD and DxF, got {x_NxD.shape} and {weight_DxF.shape}")
    if x_NxD.dtype != weight_DxF.dtype:
        raise TypeError(f"linear takes two arrays of one type, got {x_NxD.dtype} and {weight_DxF.dtype}")
    return linear_p.bind(x_NxD, weight_DxF)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.dot(x, weight)


def _batch(operands: tuple[jax.Array, jax.Array], dims: tuple[Any, Any]) -> tuple[jax.Array, int]:
    (x, weight), (x_dim, weight_dim) = operands, dims
    if weight_dim is None:
        x = jnp.moveaxis(x, x_dim, 0)
        rows = linear(x.reshape(-1, x.shape[-1]), weight)
        return rows.reshape(*x.shape[:2], -1), 0
    return jax.vmap(_product, (x_dim, weight_dim))(x, weight), 0


linear_p.def_impl(jax.jit(_product))
linear_p.def_abstract_eval(lambda x, weight: ShapedArray((x.shape[0], weight.shape[1]), x.dtype))
mlir.register_lowering(linear_p, mlir.lower_fun(_product, multiple_results=False))
batching.primitive_batchers[linear_p] = _batch
ad.defbilinear(
    linear_p,
    lambda grad, x, weight: linear(grad, weight.T),
    lambda grad, x, weight: jax.lax.dot_general(x, grad, (((0,), (0,)), ((), ()))),
)


def linear_saveable(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """A `jax.checkpoint` policy: keep the results of `linear`, recompute the rest."""
    return primitive is linear_p

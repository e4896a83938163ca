"""`linear(x, weight)`: a matrix product that stays two-dimensional under `vmap`.

The network is written for one sequence and `vmap`ped. Left to itself, `vmap` turns x·W into a three-dimensional
product, and the gradient of W into a contraction over two axes that XLA:CPU does by transposing activations first: the
gradient of a feed-forward layer takes 1.6 times as long (experiments/benchmarks/linear.py). `linear` is a JAX
primitive with one rule of its own: a batch of inputs becomes more rows, however deep `vmap`s are nested. A primitive,
because `custom_vmap` cannot be differentiated once no `vmap` is left around it.

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

from mod_star.model.few_rows_cpu import one_row
from mod_star.model.int8 import Int8Weight, int8_linear
from mod_star.model.lora import Adapted
from mod_star.model.precision import precision_of

linear_p = Primitive("linear")

FEWEST_ON_TPUS = 8
"""Rows that XLA for TPUs needs in a product to write it as one. It writes fewer as elementwise work, which it expects
to take several times as long."""


def linear(
    x_NxD: jax.Array,
    weight_DxF: jax.Array | Int8Weight | Adapted,
    dtype: Any = None,
    *,
    transposed: bool = False,
    precision: str | None = None,
) -> jax.Array:
    """x @ weight, NxF, accumulated in float32; also differentiable and vmappable.

    Args:
      x_NxD: rows.
      weight_DxF: of the same type, or in 8 bits (`mod_star.model.int8`), then without a gradient. Of an `Adapted`
        x @ weight + scale · (x @ a) @ b, each product rounded to `dtype`.
      dtype: of the result; None: that of x.
      transposed: the weight is FxD, as an embedding that serves as LM head is. (With weight.T instead, XLA:CPU converts
        16-bit weights to float32 to transpose them, at every use.)
      precision: of float32 operands: highest, high or default. None: what `jax.default_matmul_precision` says around
        the call, else highest. The gradient asks for the same.
    """
    if isinstance(weight_DxF, Int8Weight):
        return int8_linear(x_NxD, weight_DxF, dtype, transposed=transposed, precision=precision)
    if isinstance(weight_DxF, Adapted):
        return _adapted(x_NxD, weight_DxF, dtype, transposed, precision)
    inner = weight_DxF.shape[-1 if transposed else 0]
    if x_NxD.ndim != 2 or weight_DxF.ndim != 2 or x_NxD.shape[1] != inner:
        expected = "NxD and FxD" if transposed else "NxD and DxF"
        raise TypeError(f"linear takes {expected}, got {x_NxD.shape} and {weight_DxF.shape}")
    if x_NxD.dtype != weight_DxF.dtype:
        raise TypeError(f"linear takes two arrays of one type, got {x_NxD.dtype} and {weight_DxF.dtype}")
    dtype = jnp.dtype(x_NxD.dtype if dtype is None else dtype)
    jax_precision = precision_of(x_NxD.dtype, precision)
    return linear_p.bind(x_NxD, weight_DxF, dtype=dtype, transposed=transposed, precision=jax_precision, kept=True)


def _adapted(x_NxD: jax.Array, weight_DxF: Adapted, dtype: Any, transposed: bool, precision: str | None) -> jax.Array:
    if transposed:
        raise TypeError("linear takes no adapted weight that is transposed")
    own_NxF = linear(x_NxD, weight_DxF.weight, dtype, precision=precision)
    low_NxR = linear(x_NxD, weight_DxF.a, precision=precision) * weight_DxF.scale
    # Computed again from its few inputs, where `linear_saveable` would keep as much as the weight's own product takes.
    params = {"dtype": own_NxF.dtype, "precision": precision_of(x_NxD.dtype, precision), "kept": False}
    return own_NxF + linear_p.bind(low_NxR, weight_DxF.b, transposed=False, **params)


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int], dtype: Any, precision: Any) -> jax.Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    product = jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(dtype)


def _product(x: jax.Array, weight: jax.Array, *, dtype: Any, transposed: bool, precision: Any, kept: bool) -> jax.Array:
    del kept
    return _dot(x, weight, (1, int(transposed)), dtype, precision)


def _product_on_cpu(x: jax.Array, weight: jax.Array, **params: Any) -> jax.Array:
    """XLA:CPU multiplies a single 16-bit row by converting the whole weight to float32 first: ten times two rows."""
    if x.dtype == jnp.float32 or x.shape[0] != 1:
        return _product(x, weight, **params)
    in_one_pass = None if params["transposed"] else one_row(x, weight)
    if in_one_pass is not None:
        return in_one_pass.astype(params["dtype"])
    return _product(jnp.pad(x, ((0, 1), (0, 0))), weight, **params)[:1]


def _product_on_tpu(x: jax.Array, weight: jax.Array, **params: Any) -> jax.Array:
    """XLA:TPU multiplies a single row as elementwise work on the vector units: rows of zeros fill it up."""
    if x.shape[0] != 1:
        return _product(x, weight, **params)
    return _product(jnp.pad(x, ((0, FEWEST_ON_TPUS - 1), (0, 0))), weight, **params)[:1]


def _batch(operands: tuple[jax.Array, jax.Array], dims: tuple[Any, Any], **params: Any) -> tuple[jax.Array, int]:
    (x, weight), (x_dim, weight_dim) = operands, dims
    if weight_dim is None:
        x = jnp.moveaxis(x, x_dim, 0)
        rows = linear_p.bind(x.reshape(-1, x.shape[-1]), weight, **params)
        return rows.reshape(*x.shape[:2], -1), 0
    return jax.vmap(lambda x, weight: _product(x, weight, **params), (x_dim, weight_dim))(x, weight), 0


def _gradient_of_x(
    grad: jax.Array, x: Any, weight: jax.Array, *, dtype: Any, transposed: bool, precision: Any, kept: bool
) -> jax.Array:
    params = {"dtype": x.aval.dtype, "transposed": not transposed, "precision": precision, "kept": kept}
    del dtype
    return linear_p.bind(grad.astype(weight.dtype), weight, **params)


def _gradient_of_weight(
    grad: jax.Array, x: jax.Array, weight: Any, *, dtype: Any, transposed: bool, precision: Any, kept: bool
) -> jax.Array:
    del dtype, kept
    pair = (x, grad.astype(x.dtype))
    return _dot(*(pair[::-1] if transposed else pair), (0, 0), weight.aval.dtype, precision)


def _shape(
    x: ShapedArray, weight: ShapedArray, *, dtype: Any, transposed: bool, precision: Any, kept: bool
) -> ShapedArray:
    del precision, kept
    return ShapedArray((x.shape[0], weight.shape[0 if transposed else 1]), dtype)


linear_p.def_impl(functools.partial(jax.jit, static_argnames=("dtype", "transposed", "precision", "kept"))(_product))
linear_p.def_abstract_eval(_shape)
mlir.register_lowering(linear_p, mlir.lower_fun(_product, multiple_results=False))
mlir.register_lowering(linear_p, mlir.lower_fun(_product_on_cpu, multiple_results=False), platform="cpu")
mlir.register_lowering(linear_p, mlir.lower_fun(_product_on_tpu, multiple_results=False), platform="tpu")
batching.primitive_batchers[linear_p] = _batch
ad.defbilinear(linear_p, _gradient_of_x, _gradient_of_weight)


def linear_saveable(primitive: Primitive, *_: Any, **params: Any) -> bool:
    """A `jax.checkpoint` policy: keep the results of `linear`, recompute the rest (an adapter's last product, too)."""
    return primitive is linear_p and params["kept"]

"""A sum over chunks whose gradient is computed on the way forward, so that one chunk's activations exist at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def scan_sum(function: Callable[[Any, Any], tuple[jax.Array, Any]], shared: Any, chunks: Any) -> tuple[jax.Array, Any]:
    """Sum over i of function(shared, chunks[i])[0], and the second results stacked.

    `jax.checkpoint` around each chunk would bound memory too, but compute every chunk twice. A sum's gradient is the
    sum of the chunks' gradients: each is taken as soon as its chunk is computed, and added up.

    Args:
      function: (shared, chunk) -> (float32 scalar, pytree). Closes over no array.
      shared: pytree; the sum is differentiable with respect to its floating-point leaves.
      chunks: pytree whose leaves have a leading axis of chunks; not differentiated.

    Returns:
      The sum, and the stacked second results, which carry no gradient.
    """
    leaves, tree = jax.tree.flatten(shared)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    dtypes = [leaf.dtype for leaf, real in zip(leaves, is_float, strict=True) if real]
    floats = [leaf for leaf, real in zip(leaves, is_float, strict=True) if real]
    others = [leaf for leaf, real in zip(leaves, is_float, strict=True) if not real]

    def apply(floats: list[jax.Array], others: list[jax.Array], chunk: Any) -> tuple[jax.Array, Any]:
        sources = {True: iter(floats), False: iter(others)}
        return function(jax.tree.unflatten(tree, [next(sources[real]) for real in is_float]), chunk)

    @jax.custom_vjp
    def total(floats: list[jax.Array], others: list[jax.Array], chunks: Any) -> tuple[jax.Array, Any]:
        def one(sum_: jax.Array, chunk: Any) -> tuple[jax.Array, Any]:
            value, extra = apply(floats, others, chunk)
            return sum_ + value, extra

        return jax.lax.scan(one, jnp.zeros((), jnp.float32), chunks)

    def forward(floats: list[jax.Array], others: list[jax.Array], chunks: Any) -> tuple[Any, Any]:
        def one(carry: Any, chunk: Any) -> tuple[Any, Any]:
            sum_, grads = carry
            (value, extra), new = jax.value_and_grad(apply, has_aux=True)(floats, others, chunk)
            return (sum_ + value, jax.tree.map(lambda g, n: g + n.astype(jnp.float32), grads, new)), extra

        zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in floats]
        (sum_, grads), extras = jax.lax.scan(one, (jnp.zeros((), jnp.float32), zeros), chunks)
        return (sum_, extras), grads

    def backward(grads: list[jax.Array], cotangents: tuple[jax.Array, Any]) -> tuple[Any, ...]:
        return [(g * cotangents[0]).astype(dtype) for g, dtype in zip(grads, dtypes, strict=True)], None, None

    total.defvjp(forward, backward)
    return total(floats, others, chunks)

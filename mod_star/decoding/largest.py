"""The largest of a large vocabulary's logits, as a CPU finds them fast; elsewhere as JAX has them.

XLA's CPU compiler writes an argmax, and a maximum under a condition, as loops over single elements, and its top-k looks
at every element several times: of 151,936 logits they took 2 ms a row, more than the products of a small model. The
maxima of blocks are one pass with vectors. Then only the best blocks are looked into.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128
MANY = 2**13
"""From so many logits on there are blocks; there must be more of these than logits that anyone asks for."""


def argmax(logits_BxV: jax.Array) -> jax.Array:
    """Index of the largest logit of each row, int32; of equal ones the lowest."""
    if logits_BxV.shape[-1] < MANY:
        return _argmax(logits_BxV)
    return jax.lax.platform_dependent(logits_BxV, cpu=_argmax_of_blocks, default=_argmax)


def largest(logits_BxV: jax.Array, count: int) -> jax.Array:
    """The `count` largest logits of each row, falling; V must be at least as many."""
    if logits_BxV.shape[-1] < max(MANY, count * BLOCK):
        return _largest(logits_BxV, count)
    return jax.lax.platform_dependent(
        logits_BxV, cpu=lambda logits: _largest_of_blocks(logits, count), default=lambda logits: _largest(logits, count)
    )


def _argmax(logits_BxV: jax.Array) -> jax.Array:
    return jnp.argmax(logits_BxV, -1).astype(jnp.int32)


def _largest(logits_BxV: jax.Array, count: int) -> jax.Array:
    return jax.lax.top_k(logits_BxV, count)[0]


def _argmax_of_blocks(logits_BxV: jax.Array) -> jax.Array:
    blocks_BxNxK = _blocks(logits_BxV)
    block_B = jnp.argmax(jnp.max(blocks_BxNxK, -1), -1)
    inside_BxK = jnp.take_along_axis(blocks_BxNxK, block_B[:, None, None], 1)[:, 0]
    return (block_B * BLOCK + jnp.argmax(inside_BxK, -1)).astype(jnp.int32)


def _largest_of_blocks(logits_BxV: jax.Array, count: int) -> jax.Array:
    """No block but the `count` with the largest maxima can hold one of the largest that these don't hold too."""
    blocks_BxNxK = _blocks(logits_BxV)
    _, best_BxC = jax.lax.top_k(jnp.max(blocks_BxNxK, -1), count)
    return _largest(jnp.take_along_axis(blocks_BxNxK, best_BxC[:, :, None], 1).reshape(len(logits_BxV), -1), count)


def _blocks(logits_BxV: jax.Array) -> jax.Array:
    B, V = logits_BxV.shape
    padded = jnp.pad(logits_BxV, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf)
    return padded.reshape(B, -1, BLOCK)

"""The noise that stochastic routing, the control of arXiv 2404.02258 (section 4.1), decides by in place of a score."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mod_star import random_streams


def position_noise(key: jax.Array, positions_S: jax.Array) -> jax.Array:
    """Standard normal float32 per position, the same for a position however the sequence is cut up.

    From a stream of its own: whatever else is drawn from `key`, or from a key of the same seed, tells nothing of it.
    """
    key = jax.random.fold_in(key, random_streams.ROUTING_NOISE)

    def noise(position: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, position), (), jnp.float32)

    return jax.vmap(noise)(positions_S)


def noise_threshold(share: float) -> jax.Array:
    """What noise must exceed for a token to be routed with this probability, C/S: float32 scalar."""
    # Finite at a share of 1 too: an infinite logit would make the routing entropy NaN.
    return jnp.maximum(-jax.scipy.special.ndtri(jnp.float32(share)), -1e9)

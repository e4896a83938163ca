"""Exploration while training: routed blocks compute some tokens that the router's scores alone would pass by.

Under expert choice a token that is not selected gives the router no gradient, so that what the first steps select tends
to stay selected. Two ways out, both off by default, both in training alone, both without a change of shape or cost:

- `RoutingConfig.noise`: Gaussian noise on the scores that tokens are ranked by (noisy top-k gating, arXiv 1701.06538,
  equation 4). There the noise also enters the gate, and its scale is learned per expert; here the gate is that of
  the clean score, and the scale is a multiple of the scores' standard deviation in the sequence.
- `RoutingConfig.explore`: a share of the capacity goes to tokens drawn uniformly from all. Through the gate such a
  token gives its score the gradient <dL/dx', f(x)> g'(r), the first-order benefit of computing it, whatever the router
  thinks of it.

The causal rule goes on to be trained for what the clean scores select.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mod_star import random_streams
from mod_star.config import RoutingConfig
from mod_star.model.routing import capacities, capacity_of, select_top


def explores(routing: RoutingConfig) -> bool:
    """Whether training explores."""
    return routing.every > 0 and (routing.noise > 0 or routing.explore > 0)


def exploration_left(routing: RoutingConfig, step: jax.Array | int) -> jax.Array | None:
    """The float32 factor of noise and explore after `step` steps, from 1 down to 0; None: training does not explore.

    It falls linearly, and is 0 from `routing.explore_steps` on; it stays 1 if that is 0.
    """
    if not explores(routing):
        return None
    if routing.explore_steps == 0:
        return jnp.float32(1)
    return jnp.maximum(0.0, 1 - jnp.asarray(step, jnp.float32) / routing.explore_steps)


def explored_scores(
    scores_S: jax.Array, valid_S: jax.Array, routing: RoutingConfig, left: jax.Array, key: jax.Array
) -> jax.Array:
    """Float32 scores S to select by: with noise, and infinite for the tokens that are drawn. They have no gradient.

    Args:
      scores_S: float32 router scores.
      valid_S: bool; False for padding, which is never drawn and has no part in the standard deviation.
      routing: noise, explore and the capacity.
      left: float32 factor of both, see `exploration_left`.
      key: of this block and sequence; folded, so that whatever else is drawn from it tells nothing of this.
    """
    key = jax.random.fold_in(key, random_streams.EXPLORATION)
    noise_key, draw_key, count_key = jax.random.split(key, 3)
    S = scores_S.shape[0]
    ranked_S = jax.lax.stop_gradient(scores_S)
    if routing.noise:
        finite_S = valid_S & jnp.isfinite(ranked_S)
        # Zeros where it does not count: infinity less infinity is NaN even where it is masked.
        spread = jnp.std(jnp.where(finite_S, ranked_S, 0.0), where=finite_S)
        scale = left * routing.noise * jnp.where(jnp.any(finite_S), spread, 0.0)
        ranked_S += scale * jax.random.normal(noise_key, (S,), jnp.float32)
    if routing.explore:
        capacity = jnp.asarray(capacities(routing, S))[jnp.sum(valid_S, dtype=jnp.int32)]
        # Rounded up or down by chance: the share is met on average, also where it is less than one token.
        share = left * routing.explore * capacity
        count = jnp.floor(share + jax.random.uniform(count_key)).astype(jnp.int32)
        slots = math.ceil(routing.explore * capacity_of(routing, S))
        drawn = select_top(jax.random.uniform(draw_key, (S,)), valid_S, slots, jnp.minimum(count, capacity))
        ranked_S = jnp.where(drawn.mask_S, jnp.inf, ranked_S)
    return ranked_S

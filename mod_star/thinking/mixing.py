"""The mixing head: how much of the prediction after a thought goes into the final one (Quiet-STaR, section 4.3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig
from mod_star.model.doors import require_array
from mod_star.model.layers import Params, fan_in_normal
from mod_star.model.linear import linear
from mod_star.model.parts import Part, Parts
from mod_star.model.precision import HIGHEST, highest_products
from mod_star.model.transformer import logits_of


def mixing_weight(params: Params, base_NxD: jax.Array, thought_NxD: jax.Array) -> jax.Array:
    """The weight w of the thought's prediction, float32 N: Linear-ReLU-Linear-ReLU-Linear of both hidden states.

    Not squashed, as in the authors' code: w may leave [0, 1].
    """
    x = jnp.concatenate([base_NxD, thought_NxD], -1).astype(jnp.float32)
    x = jax.nn.relu(linear(x, params["first"], precision="highest") + params["first_bias"])
    x = jax.nn.relu(linear(x, params["second"], precision="highest") + params["second_bias"])
    return jnp.matmul(x, params["output"], precision=HIGHEST) + params["output_bias"]


def mixing_init(key: jax.Array, config: ModelConfig) -> Params:
    """Parameters of `mixing_weight`: two hidden layers and an output of zeros."""
    D = config.width
    first, second = jax.random.split(key)
    return {
        "first": fan_in_normal(first, (2 * D, D), 2 * D),
        "first_bias": jnp.zeros(D, jnp.float32),
        "second": fan_in_normal(second, (D, D), D),
        "second_bias": jnp.zeros(D, jnp.float32),
        "output": jnp.zeros(D, jnp.float32),
        "output_bias": jnp.zeros((), jnp.float32),
    }


MIXING = Part(mixing_init, mixing_weight)
"""The mixing head of the paper."""


def thought_weight(parts: Parts, params: dict[str, Any], base_NxD: jax.Array, thought_NxD: jax.Array) -> jax.Array:
    """The weight of the thought's prediction by the mixing in force, float32 N.

    Args:
      parts: the model's.
      params: the model's, with the entry "thinking".
      base_NxD: hidden states without a thought.
      thought_NxD: hidden states after it.

    Raises:
      InputError: a user's mixing gives another shape or type.
    """
    with highest_products():
        weights_N = (parts.mixing or MIXING).apply(params["thinking"]["mixing"], base_NxD, thought_NxD)
    return require_array("mixing", weights_N, base_NxD.shape[:1])


def mix(base_NxD: jax.Array, thought_NxD: jax.Array, weights_N: jax.Array) -> jax.Array:
    """(1 - w)·base + w·thought, float32 NxD; exactly the base where w is 0.

    Mixing hidden states before an LM head without bias is mixing logits, vocabulary/width times cheaper. The result
    must stay float32: rounded to 16 bits, it would lose what a small w changes, and with it every reward.
    """
    base, thought = base_NxD.astype(jnp.float32), thought_NxD.astype(jnp.float32)
    return base + weights_N[:, None] * (thought - base)


def mixed_logits(
    params: dict[str, Any], base_NxD: jax.Array, thought_NxD: jax.Array, weights_N: jax.Array
) -> jax.Array:
    """Float32 logits NxV of the mixed prediction.

    Hidden states of 16 bits go through the head one by one, in exact products, and their float32 logits are mixed:
    accelerators multiply 16-bit numbers many times as fast as the float32 mix.
    """
    if base_NxD.dtype == jnp.float32:
        return logits_of(params, mix(base_NxD, thought_NxD, weights_N))
    base_NxV, thought_NxV = logits_of(params, base_NxD), logits_of(params, thought_NxD)
    return base_NxV + weights_N[:, None] * (thought_NxV - base_NxV)

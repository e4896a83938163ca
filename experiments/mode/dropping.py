"""Experts with too little capacity: a `Parts` whose experts take a share of the tokens that come, and drop the rest.

The control that the paper compares integrated Mixture-of-Depths-and-Experts with (arXiv 2404.02258, section 4.3). Of a
sequence's tokens the earlier ones are taken, so that what happens to a token depends on those before it alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mod_star import Parts
from mod_star.config import ModelConfig
from mod_star.model.experts import Choice, choose, experts_init
from mod_star.model.grouped import grouped_linear
from mod_star.model.linear import linear
from mod_star.parts import Part

EXPERTS, ACTIVE, WIDTH, CAPACITY = 8, 2, 192, 2 / 3
"""Experts, how many a token chooses, their hidden width, and their slots as a share of an even load."""


def init(key: jax.Array, config: ModelConfig) -> dict[str, Any]:
    """Parameters as of `model.experts`."""
    return experts_init(key, replace(config, experts=EXPERTS, experts_active=ACTIVE, experts_width=WIDTH))


def apply(params: dict[str, Any], x_NxD: jax.Array) -> tuple[jax.Array, Choice]:
    """The experts' weighted sum; an expert that is full gives zero."""
    N = x_NxD.shape[0]
    logits = linear(x_NxD.astype(jnp.float32), params["router"], precision="highest")
    weights, chosen_NxA, probabilities = choose(logits, ACTIVE, None)
    counts = jnp.sum(jax.nn.one_hot(chosen_NxA, EXPERTS, dtype=jnp.float32), 1)
    before = jnp.cumsum(counts, 0) - counts  # of each expert, by tokens before this one
    slots = math.ceil(CAPACITY * N * ACTIVE / EXPERTS)
    is_taken = jnp.take_along_axis(before, chosen_NxA, 1) < slots
    group = jnp.where(is_taken, chosen_NxA, EXPERTS).reshape(-1)

    def product(rows: jax.Array, name: str) -> jax.Array:
        return grouped_linear(rows, params["experts"][name].astype(rows.dtype), group)

    rows = jnp.repeat(x_NxD, ACTIVE, 0)
    hidden = jax.nn.silu(product(rows, "gate")) * product(rows, "up")
    result = jnp.sum(product(hidden, "down").reshape(N, ACTIVE, -1) * weights[..., None], 1)
    return result.astype(x_NxD.dtype), Choice(probabilities, counts)


def flops(config: ModelConfig, tokens: int) -> float:
    """Operations where every slot is taken."""
    return 2.0 * tokens * config.width * (EXPERTS + CAPACITY * ACTIVE * 3 * WIDTH)


parts = Parts(feed_forward=Part(init, apply, flops))

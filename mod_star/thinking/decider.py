"""The decider: a small head that learns how much a thought would help before a token, from the hidden state without it.

Think-at-Hard (arXiv 2511.08577) decides by such a head which tokens get a second pass. Its head learns which tokens the
first pass gets wrong. This one learns what a thought gains: the NLL of the next token without a thought less that after
it. `--think auto` then thinks where the gain that is expected is above a threshold (`mod-star calibrate --by decider`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig
from mod_star.errors import InputError
from mod_star.model.layers import Params, fan_in_normal
from mod_star.model.linear import linear
from mod_star.model.precision import HIGHEST


def decider_init(key: jax.Array, config: ModelConfig, width: int) -> Params:
    """Parameters of `expected_gain`: a hidden layer of `width` and an output of zeros, so that no gain is expected."""
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    hidden = fan_in_normal(key, (config.width, width), config.width)
    return {"hidden": hidden, "bias": zeros(width), "output": zeros(width), "shift": zeros(())}


def decider_of(params: dict[str, Any]) -> Params:
    """The parameters of a model's decider.

    Raises:
      InputError: the model has none.
    """
    if "decider" not in params.get("thinking", {}):
        raise InputError("by = 'decider': must be 'entropy': the model has no decider (thinking.decider_width is 0)")
    decider: Params = params["thinking"]["decider"]
    return decider


def expected_gain(params: Params, hidden_NxD: jax.Array) -> jax.Array:
    """The gain that is expected of a thought, float32 N, in nats of the next token.

    Its input is detached: learning it costs the language model nothing.

    Args:
      params: from `decider_init`.
      hidden_NxD: hidden states without a thought, after the final norm.
    """
    x = jax.lax.stop_gradient(hidden_NxD).astype(jnp.float32)
    hidden = jax.nn.relu(linear(x, params["hidden"], precision="highest") + params["bias"])
    return jnp.matmul(hidden, params["output"], precision=HIGHEST) + params["shift"]


def decider_error(params: Params, hidden_NxD: jax.Array, gain_N: jax.Array, where_N: jax.Array) -> jax.Array:
    """Sum of the squared errors of the expected gains, float32, in nats squared; its minimum is the mean gain.

    Args:
      params: from `decider_init`.
      hidden_NxD: as for `expected_gain`.
      gain_N: float32 gains that came out; not differentiated.
      where_N: bool; the others do not count.
    """
    error_N = expected_gain(params, hidden_NxD) - jax.lax.stop_gradient(gain_N)
    return jnp.sum(jnp.where(where_N, jnp.square(error_N), 0.0))


def decider_flops(model: ModelConfig, width: int, rows: int) -> float:
    """Operations of `expected_gain` for `rows` hidden states."""
    return 2.0 * rows * (model.width * width + width)

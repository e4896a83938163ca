"""The skip path of a routed block: a small map of the tokens that pass by (FlexiDepth, arXiv 2503.23798, section 3).

The map is linear and of low rank, up(down(x / rms(x))): `mod_star.pretrained.calibration` fits it in closed form.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig, RoutingConfig
from mod_star.model.layers import Params, fan_in_normal, unit_rms
from mod_star.model.linear import linear


def adapter_init(key: jax.Array, config: ModelConfig, routing: RoutingConfig) -> Params:
    """Parameters of `adapter`: down DxR random, up RxD zero, so that tokens pass by unchanged at first."""
    D, R = config.width, routing.adapter_rank
    return {"down": fan_in_normal(key, (D, R), D), "up": jnp.zeros((R, D), jnp.float32)}


def adapter(params: Params, x_NxD: jax.Array) -> jax.Array:
    """What is added to tokens that pass by, NxD in x's type; row i from row i alone."""
    dtype = x_NxD.dtype
    unit_NxD = unit_rms(x_NxD).astype(dtype)
    return linear(linear(unit_NxD, params["down"].astype(dtype)), params["up"].astype(dtype))


def adapter_flops(model: ModelConfig, tokens: int, routing: RoutingConfig) -> float:
    """Operations of `adapter` for `tokens` tokens."""
    return 4.0 * tokens * model.width * routing.adapter_rank

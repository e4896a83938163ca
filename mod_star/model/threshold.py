"""The threshold rule: a routed block computes a token if its router score is above a threshold of the block.

It decides causally, as the predictor does, and has nothing to learn: a threshold per routed block and capacity is a
quantile of the scores on held-out text (`mod_star.inspection.routing_calibration`). Expert choice of section 3.2 of
arXiv 2404.02258 takes the tokens above the C-th highest score of their sequence; this rule puts one number in the place
of that score, which is known before the sequence is.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig, RoutingConfig
from mod_star.errors import require
from mod_star.model.layers import Params
from mod_star.model.parts import Part
from mod_star.model.routing import Noise, no_flops
from mod_star.model.transformer import Decoder, StackedParams, group_count


def threshold_init(key: jax.Array, config: ModelConfig, routing: RoutingConfig) -> Params:
    """Parameters of `threshold_rule`: a threshold of 0."""
    del key, config, routing
    return {"threshold": jnp.zeros((), jnp.float32)}


def threshold_rule(
    params: Params, x_SxD: jax.Array, scores_S: jax.Array, noise: Noise, routing: RoutingConfig, context: int
) -> jax.Array:
    """Causal rule: the router's score less the block's threshold is the logit."""
    del x_SxD, noise, routing, context
    return scores_S - params["threshold"]


THRESHOLD_RULE = Part(threshold_init, threshold_rule, no_flops)


def with_thresholds(decoder: Decoder, params: StackedParams, thresholds_G: jax.Array) -> tuple[Decoder, StackedParams]:
    """A model whose routed blocks decide by `threshold_rule`; weights are shared with the one that is given.

    Args:
      decoder: the model.
      params: its parameters, groups stacked. Those of its own causal rule are left out of the result.
      thresholds_G: float32, one per routed block.

    Raises:
      InputError: there are more or fewer thresholds than routed blocks.
    """
    G = group_count(decoder.config, decoder.routing)
    shape = tuple(thresholds_G.shape)
    require(shape == (G,), "thresholds", shape, f"must be as many as routed blocks, ({G},)")
    routed = {**params["groups"]["routed"], "predictor": {"threshold": thresholds_G}}
    decoder = decoder.clone(parts=replace(decoder.parts, causal_rule=THRESHOLD_RULE))
    return decoder, {**params, "groups": {**params["groups"], "routed": routed}}

"""The replaceable parts of the network: pure functions with their initialisers.

Make a `Parts` with your own functions in a file of your own and name it on the command line
(`mod-star train RUN --parts my_parts.py:parts`) or pass it to `Decoder`. Nothing has to be registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from mod_star.config import RoutingConfig
from mod_star.model.blocks import block, block_init
from mod_star.model.layers import swiglu, swiglu_init
from mod_star.model.routing import GATES, linear_router, linear_router_init


@dataclass(frozen=True)
class Part:
    """A pure function of (params, arrays) and the function that makes its parameters."""

    init: Callable[..., Any]
    """(key, ModelConfig) -> pytree of float32 arrays; a block's gets the `Parts` as third argument."""
    apply: Callable[..., Any]
    """(params, arrays...) -> arrays; see `Parts` for each part's shapes."""
    flops: Callable[..., float] | None = None
    """(ModelConfig, tokens) -> operations of `apply`, two per multiply-add; a block's gets as third argument how many
    keys each token attends to. None: counted. Needed where that can't be (an unknown number of iterations)."""


@dataclass(frozen=True)
class Parts:
    """What the network is assembled from. Replace any with `dataclasses.replace` or in the constructor."""

    router: Part = Part(linear_router_init, linear_router)
    """apply(params, x_SxD) -> r_S, float32 scores. Score i must depend on x_i alone, or causal sampling breaks."""
    gate: Callable[[jax.Array], jax.Array] | None = None
    """Elementwise r_C -> gate_C, float32, that scales a routed block's delta. None: what `RoutingConfig.gate` names."""
    feed_forward: Part = Part(swiglu_init, swiglu)
    """apply(params, x_NxD) -> NxD, token by token, in x's type."""
    block: Part = Part(block_init, block)
    """apply as `mod_star.model.blocks.block`: (params, x, positions, segment_ids, valid, context, config, parts)."""

    def gate_of(self, routing: RoutingConfig) -> Callable[[jax.Array], jax.Array]:
        """The gate in force."""
        return GATES[routing.gate] if self.gate is None else self.gate


DEFAULT_PARTS = Parts()

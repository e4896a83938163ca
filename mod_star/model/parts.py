"""The replaceable parts of the network and of its training: pure functions with their initialisers.

Make a `Parts` with your own functions in a file of your own and name it on the command line
(`mod-star train RUN --parts my_parts.py:parts`) or pass it to `Decoder`. Nothing has to be registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import RoutingConfig
from mod_star.model.attention import KeyValues
from mod_star.model.blocks import block, block_init
from mod_star.model.layers import swiglu, swiglu_init
from mod_star.model.precision import highest_products, products_of
from mod_star.model.routing import GATES, linear_router, linear_router_init


@dataclass(frozen=True)
class Part:
    """A pure function of (params, arrays) and the function that makes its parameters."""

    init: Callable[..., Any]
    """(key, ModelConfig) -> pytree of float32 arrays; a block's gets the `Parts` as third argument."""
    apply: Callable[..., Any]
    """(params, arrays...) -> arrays; see `Parts` for each part's shapes. Its products of float32 operands ask for the
    highest precision (a router's), or for `ModelConfig.precision` (in a float32 model); one that says more is left."""
    flops: Callable[..., float] | None = None
    """(ModelConfig, tokens) -> operations of `apply`, two per multiply-add; a block's gets as third argument how many
    keys each token attends to. None: counted. Needed where that can't be (an unknown number of iterations)."""


@dataclass(frozen=True)
class ThoughtInput:
    """What a thought reads at its next step: how it is drawn from the last step, and how it is embedded.

    `draw` runs without gradients, while a thought is sampled. `embed` runs then, and again when the thought is scored;
    there it is differentiated with respect to params alone.
    """

    draw: Callable[..., Any]
    """(params, hidden_D, logits_V, key, temperature) -> (token, kept). token: int32, drawn from
    softmax(logits / temperature), which REINFORCE reinforces; -1 where no token is drawn, which has no log-probability.
    kept: what `embed` needs besides, a pytree of arrays, the same for every step; None: nothing."""
    embed: Callable[..., Any]
    """(params, tokens_N, kept_N) -> float32 NxD, input embeddings; row i from row i alone."""
    init: Callable[..., Any] | None = None
    """(key, ModelConfig) -> pytree of float32 arrays, found at params["thinking"]["thought"]. None: no parameters."""


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
    """apply as `mod_star.model.blocks.block`: (params, x, positions, segment_ids, valid, memory, config, parts)."""
    objective: Callable[..., Any] | None = None
    """(Decoder, RunConfig) -> `mod_star.training.objectives.Objective`: what is minimised and measured. None: what
    `train.objective` names; that field decides in any case whether there are parameters of thinking."""
    optimizer: Callable[..., Any] | None = None
    """(RunConfig, steps of the run) -> optax.GradientTransformation, all that happens to gradients; see
    `mod_star.training.optimizer` for the built-in one and its pieces, such as `clip_apart`. None: AdamW."""
    reward: Callable[..., jax.Array] | None = None
    """(log_likelihoods_BxJxMxN, `Thought` of [B, J, M, T]) -> advantages, float32 BxJxM: reward less baseline of M
    thoughts at each of J places, each place on its own. The log-likelihoods, in nats, are those of N tokens after the
    thought; 0 for those that don't count. None: what `thinking.baseline` names."""
    thought: ThoughtInput | None = None
    """What a thought reads at its next step. None: what `thinking.kind` names."""
    mixing: Part | None = None
    """apply(params, base_NxD, thought_NxD) -> float32 weights N of the thought's prediction, row by row, from the
    hidden states without and with it. None: the paper's head, `mod_star.thinking.mixing.mixing_weight`."""
    where_to_think: Callable[..., jax.Array] | None = None
    """(batch, hidden_BxCxD, head_VxD, key, chunk) -> float32 scores BxC: in training, the positions with the highest
    think, `thinking.think_fraction` of them. Arrays of `batch` are BxC; at most `chunk` positions' logits are to exist
    at one time. None: what `thinking.think_where` names."""

    def score(self, params: Any, x_SxD: jax.Array) -> jax.Array:
        """The router's float32 scores S."""
        with highest_products():
            scores_S: jax.Array = self.router.apply(params, x_SxD)
        return scores_S.astype(jnp.float32)

    def compute_block(self, params: Any, x_NxD: jax.Array, *arrays: Any) -> tuple[jax.Array, KeyValues]:
        """The block's delta NxD and keys/values.

        Args:
          params: the block's.
          x_NxD: residual stream.
          arrays: positions, segment ids, validity, memory and `ModelConfig`, as for `mod_star.model.blocks.block`.
        """
        with products_of(arrays[-1]):
            result: tuple[jax.Array, KeyValues] = self.block.apply(params, x_NxD, *arrays, self)
        return result

    def gate_of(self, routing: RoutingConfig) -> Callable[[jax.Array], jax.Array]:
        """The gate in force."""
        return GATES[routing.gate] if self.gate is None else self.gate


DEFAULT_PARTS = Parts()

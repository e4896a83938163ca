"""The replaceable parts of the network and of its training: pure functions with their initialisers.

Make a `Parts` with your own functions in a file of your own and name it on the command line
(`mod-star train RUN --parts my_parts.py:parts`) or pass it to `Decoder`. Nothing has to be registered. What your
functions return is checked where it is traced, before anything is compiled (`require_array`, `require_same_structure`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig, RoutingConfig
from mod_star.errors import InputError, require
from mod_star.model.attention import KeyValues
from mod_star.model.blocks import block, block_init, block_keys_values
from mod_star.model.experts import Load, experts, experts_flops, experts_init
from mod_star.model.exploration import explored_scores
from mod_star.model.layers import swiglu, swiglu_init, unit_rms
from mod_star.model.lora import with_merged
from mod_star.model.moves import Selection
from mod_star.model.precision import highest_products, products_of
from mod_star.model.routing import (
    GATES,
    Noise,
    RoutingCall,
    Tokens,
    capacity_of,
    expert_choice,
    linear_router,
    linear_router_init,
    no_flops,
    no_parameters,
    predictor_flops,
    predictor_init,
    predictor_rule,
    router_rule,
    rule_cross_entropy,
    stochastic_choice,
    stochastic_noise,
    stochastic_rule,
)
from mod_star.model.skip_path import adapter, adapter_flops, adapter_init


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


SELECTIONS = {"learned": expert_choice, "stochastic": stochastic_choice}
"""How tokens are selected in top_k mode, by `RoutingConfig.selection`."""
_STOCHASTIC_RULE = Part(no_parameters, stochastic_rule, no_flops)
CAUSAL_RULES = {
    ("learned", "predictor"): Part(predictor_init, predictor_rule, predictor_flops),
    ("learned", "router"): Part(no_parameters, router_rule, no_flops),
    ("stochastic", "predictor"): _STOCHASTIC_RULE,
    ("stochastic", "router"): _STOCHASTIC_RULE,
}
"""What decides without the future, by `RoutingConfig.selection` and `RoutingConfig.causal_rule`."""
AUXILIARY_LOSSES = {"learned": rule_cross_entropy, "stochastic": None}
"""What trains the causal rule, by `RoutingConfig.selection`; None: it has nothing to learn."""


@dataclass(frozen=True)
class ThoughtInput:
    """What a thought reads at its next step: how it is drawn from the last step, and how it is embedded.

    `draw` runs without gradients, while a thought is sampled. `embed` runs then, and again when the thought is scored;
    there it is differentiated with respect to params alone.
    """

    draw: Callable[..., Any]
    """(params, hidden_D, logits_V, key, temperature) -> (token, extra). token: int32, drawn from
    softmax(logits / temperature), which REINFORCE reinforces; -1 where no token is drawn, which has no log-probability.
    extra: what `embed` needs besides, a pytree of arrays, the same for every step; None: nothing."""
    embed: Callable[..., Any]
    """(params, tokens_N, extra_N) -> float32 NxD, input embeddings; row i from row i alone."""
    init: Callable[..., Any] | None = None
    """(key, ModelConfig) -> pytree of float32 arrays, found at params["thinking"]["thought"]. None: no parameters."""


@dataclass(frozen=True)
class LatentInput:
    """What a latent thought reads at its next step: a function of the last step that the gradient goes back through.

    A latent thought draws no tokens, so REINFORCE has nothing to reinforce, and all thoughts of a place are the same.
    """

    feed_back: Callable[..., jax.Array]
    """(params, hidden_D) -> float32 D: the next input, from the hidden state (after the final norm) of the last step.
    It is differentiated with respect to both."""
    init: Callable[..., Any] | None = None
    """As for `ThoughtInput`."""


SWIGLU = Part(swiglu_init, swiglu)
ADAPTER = Part(adapter_init, adapter, adapter_flops)
"""Of the skip path, with `RoutingConfig.adapter_rank`."""


@functools.cache
def experts_part(config: ModelConfig) -> Part:
    """The experts that `config` describes, as a feed-forward part; equal configurations give the same one."""
    return Part(experts_init, functools.partial(experts, config=config), experts_flops)


@dataclass(frozen=True)
class Parts:
    """What the network is assembled from. Replace any with `dataclasses.replace` or in the constructor."""

    router: Part = Part(linear_router_init, linear_router)
    """apply(params, x_SxD) -> r_S, float32 scores. Score i must depend on x_i alone, or causal sampling breaks."""
    gate: Callable[[jax.Array], jax.Array] | None = None
    """Elementwise r_C -> gate_C, float32, that scales a routed block's delta. None: what `RoutingConfig.gate` names."""
    feed_forward: Part = SWIGLU
    """apply(params, x_NxD) -> NxD, token by token, in x's type; or that and a `mod_star.model.experts.Choice`, which is
    balanced and logged. `model.experts` puts experts in the place of the default; a block asks `feed_forward_of`."""
    block: Part = Part(block_init, block)
    """apply as `mod_star.model.blocks.block`: (params, x, positions, segment_ids, valid, memory, config, parts)."""
    adapter: Part | None = None
    """What is added to tokens that pass by a routed block. init(key, ModelConfig, RoutingConfig) -> pytree;
    apply(params, x_NxD) -> NxD, token by token, in x's type. flops gets the `RoutingConfig` as third argument. None:
    nothing, or a linear map of rank `RoutingConfig.adapter_rank`."""
    selection: Callable[..., Selection] | None = None
    """(scores_S, valid_S, RoutingConfig, noise) -> `Selection` of `capacity_of(RoutingConfig, S)` slots: the tokens
    that a routed block computes in top_k mode. `noise()`: float32 S. Where training explores, the scores have noise,
    and are infinite for tokens that are drawn. None: what `RoutingConfig.selection` names."""
    causal_rule: Part | None = None
    """What decides without the future. init(key, ModelConfig, RoutingConfig) -> pytree; apply(params, x_SxD, scores_S,
    noise, RoutingConfig, context) -> logits_S, float32, positive for tokens to compute. Logit i must depend on token i
    alone. flops gets the `RoutingConfig` as third argument. None: what `RoutingConfig.causal_rule` names."""
    auxiliary_loss: Callable[..., jax.Array] | None = None
    """(Trace of [B, groups, S] arrays, valid_BxS, target [B, groups, S]) -> float32 [groups], summed over the valid
    tokens. Its mean, times `RoutingConfig.auxiliary_weight`, is added to the loss. None: binary cross-entropy of the
    causal rule against `target`, the tokens that top_k mode selects; nothing for stochastic routing."""
    objective: Callable[..., Any] | None = None
    """(Decoder, RunConfig) -> `mod_star.training.objectives.Objective`: what is minimised and measured. None: what
    `train.objective` names; that field decides in any case whether there are parameters of thinking."""
    optimizer: Callable[..., Any] | None = None
    """(RunConfig, steps of the run) -> optax.GradientTransformation, all that happens to gradients. Its trees have the
    parameters that `train.trainable` names, with their paths, and no others; see
    `mod_star.training.optimizer` for the built-in one and its pieces, such as `clip_apart`. None: AdamW."""
    reward: Callable[..., jax.Array] | None = None
    """(log_likelihoods_BxJxMxN, `Thought` of [B, J, M, T]) -> advantages, float32 BxJxM: reward less baseline of M
    thoughts at each of J places, each place on its own. The log-likelihoods, in nats, are those of N tokens after the
    thought; 0 for those that don't count. None: what `thinking.baseline` names."""
    thought: ThoughtInput | LatentInput | None = None
    """What a thought reads at its next step. None: what `thinking.kind` names."""
    mixing: Part | None = None
    """apply(params, base_NxD, thought_NxD) -> float32 weights N of the thought's prediction, row by row, from the
    hidden states without and with it. None: what `ThinkingConfig.mixing` names."""
    where_to_think: Callable[..., jax.Array] | None = None
    """(batch, hidden_BxCxD, head_VxD, key, chunk) -> float32 scores BxC: in training, the positions with the highest
    think, `thinking.think_fraction` of them. Arrays of `batch` are BxC; at most `chunk` positions' logits are to exist
    at one time. None: what `thinking.think_where` names."""

    def score(self, params: Any, x_SxD: jax.Array, routing: RoutingConfig) -> jax.Array:
        """The router's float32 scores S, of the stream as it is or at unit RMS (`RoutingConfig.router_norm`)."""
        if routing.router_norm:
            x_SxD = unit_rms(x_SxD)
        with highest_products():
            scores_S: jax.Array = self.router.apply(params, x_SxD)
        return scores_S.astype(jnp.float32)

    def select(
        self, scores_S: jax.Array, valid_S: jax.Array, routing: RoutingConfig, noise: Noise | None = None
    ) -> Selection:
        """The tokens that a routed block computes in top_k mode.

        Args:
          scores_S: float32 router scores.
          valid_S: bool; False for padding.
          routing: names the selection, and gives its capacity.
          noise: of the tokens' positions; None where there is none to draw.

        Raises:
          InputError: a user's selection has another number of slots than the capacity, which budgets count with.
        """
        S = scores_S.shape[0]
        noise = stochastic_noise(None, jnp.arange(S, dtype=jnp.int32)) if noise is None else noise
        select = SELECTIONS[routing.selection] if self.selection is None else self.selection
        selection = select(scores_S, valid_S, routing, noise)
        slots, C = selection.indices_C.shape[0], capacity_of(routing, S)
        require(slots == C, "parts.selection", f"{slots} slots", f"must have as many as the capacity, {C}")
        return selection

    def explore(
        self, scores_S: jax.Array, valid_S: jax.Array, routing: RoutingConfig, call: RoutingCall, noise: Noise
    ) -> Selection:
        """The tokens that a routed block computes in a step that explores: `select`, by other scores.

        Args:
          scores_S: float32 router scores.
          valid_S: bool; False for padding.
          routing: as for `select`.
          call: its `exploration` says how much is left, its `key` is this block's.
          noise: as for `select`.

        Raises:
          InputError: there is no key.
        """
        if call.key is None:
            raise InputError(f"routing.noise = {routing.noise}, routing.explore = {routing.explore}: need a key")
        left: Any = call.exploration
        return self.select(explored_scores(scores_S, valid_S, routing, left, call.key), valid_S, routing, noise)

    def causal_rule_of(self, routing: RoutingConfig) -> Part:
        """The causal rule in force."""
        return CAUSAL_RULES[routing.selection, routing.causal_rule] if self.causal_rule is None else self.causal_rule

    def decide(
        self,
        params: Any,
        x_SxD: jax.Array,
        scores_S: jax.Array,
        noise: Noise,
        routing: RoutingConfig,
        config: ModelConfig,
    ) -> jax.Array:
        """The causal rule's float32 logits S; `params` are its own, {} for a rule without any."""
        with highest_products():
            rule = self.causal_rule_of(routing)
            logits_S: jax.Array = rule.apply(params, x_SxD, scores_S, noise, routing, config.context)
        return logits_S.astype(jnp.float32)

    def auxiliary_loss_of(self, routing: RoutingConfig) -> Callable[..., jax.Array] | None:
        """The loss in force that trains the causal rule; None: there is none."""
        return AUXILIARY_LOSSES[routing.selection] if self.auxiliary_loss is None else self.auxiliary_loss

    def feed_forward_of(self, config: ModelConfig) -> Part:
        """The feed-forward part in force.

        Raises:
          InputError: `model.experts` asks for experts, but there is a user's own layer.
        """
        if config.experts == 0:
            return self.feed_forward
        allowed = "must be 0 with parts.feed_forward of your own"
        require(self.feed_forward is SWIGLU, "model.experts", config.experts, allowed)
        return experts_part(config)

    def compute_block(self, params: Any, x_NxD: jax.Array, *arrays: Any) -> tuple[jax.Array, KeyValues, Load | None]:
        """The block's delta NxD, keys/values, and the load of its experts; None: it has none.

        Args:
          params: the block's; those of a user's block are merged with their adapters, if they have any.
          x_NxD: residual stream.
          arrays: positions, segment ids, validity, memory and `ModelConfig`, as for `mod_star.model.blocks.block`.
        """
        if self.block.apply is not block:  # a user's own takes arrays
            params = with_merged(params)
        with products_of(arrays[-1]):
            delta_NxD, keys_values, *load = self.block.apply(params, x_NxD, *arrays, self)
        return delta_NxD, keys_values, load[0] if load else None

    def keys_values(self, params: Any, tokens: Tokens, config: ModelConfig) -> KeyValues:
        """The keys/values of all tokens in a block.

        Args:
          params: the block's.
          tokens: the stream before the block.
          config: sizes.

        Raises:
          InputError: the block is a user's own.
        """
        allowed = "must be False with parts.block of your own"
        require(self.block.apply is block, "routing.keep_key_values", True, allowed)
        ids_N = tokens.segment_ids_N
        return block_keys_values(params, tokens.x_NxD, tokens.positions_N, ids_N, ids_N > 0, config)

    def adapter_of(self, routing: RoutingConfig) -> Part | None:
        """The adapter of the skip path in force; None: tokens pass by unchanged."""
        return ADAPTER if self.adapter is None and routing.adapter_rank else self.adapter

    def adapt(self, params: Any, x_NxD: jax.Array, routing: RoutingConfig) -> jax.Array | None:
        """What is added to tokens that pass by, NxD in x's type; None: nothing. `params` are the adapter's."""
        part = self.adapter_of(routing)
        if part is None:
            return None
        return require_array("adapter", part.apply(params, x_NxD), x_NxD.shape, x_NxD.dtype)

    def gate_of(self, routing: RoutingConfig) -> Callable[[jax.Array], jax.Array]:
        """The gate in force."""
        return GATES[routing.gate] if self.gate is None else self.gate


DEFAULT_PARTS = Parts()


def require_array(door: str, value: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """The array that a user's function has returned.

    Args:
      door: field of `mod_star.Parts`, and what of it, for the error.
      value: what was returned.
      shape: that it must have.
      dtype: that it must have.

    Raises:
      InputError: it is no array, or of another shape or type; names the door.
    """
    expected = f"{jnp.dtype(dtype).name}{list(shape)}"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise InputError(f"parts.{door} = {type(value).__name__}: must be an array {expected}")
    if tuple(value.shape) != tuple(shape) or value.dtype != dtype:
        raise InputError(f"parts.{door} = {value.dtype}{list(value.shape)}: must be {expected}")
    return jnp.asarray(value)


def require_same_structure(door: str, value: Any, like: Any) -> Any:
    """The pytree that a user's function has returned; its leaves must be as those of `like`.

    Raises:
      InputError: the structure, or a leaf's shape or type, is another; names the door and the leaf.
    """
    structure, expected = str(jax.tree.structure(value)), str(jax.tree.structure(like))
    if structure != expected:
        raise InputError(f"parts.{door} = {structure}: must have the structure {expected}")
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(value), jax.tree.leaves(like), strict=True):
        require_array(f"{door}{jax.tree_util.keystr(path)}", leaf, other.shape, other.dtype)
    return value

"""The decoder: embedding, groups of (full blocks, one routed block), final norm. Written for one sequence; vmap it.

Parameters are a plain nested dict. The blocks' are stacked over groups, {"groups": {"full_0": ..., "routed": ...}},
and applied by `lax.scan`, so that compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NewType, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mod_star import random_streams
from mod_star.config import ModelConfig, RoutingConfig, require_network
from mod_star.distributed.sharding import constrain
from mod_star.errors import require
from mod_star.model.attention import KeyValues
from mod_star.model.experts import Load
from mod_star.model.grouped import grouped_saveable
from mod_star.model.layers import fan_in_normal, lookup, rms_norm
from mod_star.model.linear import linear, linear_saveable
from mod_star.model.lora import is_adapted, require_merged
from mod_star.model.parts import DEFAULT_PARTS, Parts
from mod_star.model.pooled import pooled_block, require_poolable
from mod_star.model.routing import RoutingCall, RoutingMode, Tokens, Trace, routed_block

StackedParams: TypeAlias = dict[str, Any]
"""A model's parameters as they are trained, saved and loaded: those of the blocks stacked over groups,
{"groups": {"full_0": ..., "routed": ...}, "embedding": ..., ...}."""
UnstackedParams = NewType("UnstackedParams", dict[str, Any])
"""The same with a tuple of one dict per group in "groups", each in memory of its own: what decoding takes, see
`mod_star.decoding.step.own_params`."""


@struct.dataclass
class Output:
    """What `Decoder` returns for one sequence."""

    hidden: jax.Array
    """SxD after the final norm, in the compute type; times the LM head gives logits."""
    trace: Trace | None
    """Routing decisions; None for a dense model."""
    keys_values: Any
    """{block name: KeyValues} stacked over groups; from unrolled groups a tuple of such; None unless asked for."""
    load: Load | None = None
    """Load of the blocks' experts, [groups, blocks of a group with experts, ...]; None without experts."""


def block_names(routing: RoutingConfig) -> tuple[str, ...]:
    """Names of the blocks of one group, in order: full_0, ..., and routed in the place of `routing.first`."""
    if routing.every == 0:
        return ("full_0",)
    names = [f"full_{i}" for i in range(routing.every - 1)]
    names.insert((routing.first or routing.every) - 1, "routed")
    return tuple(names)


def routed_blocks(config: ModelConfig, routing: RoutingConfig) -> range:
    """Numbers of a routed model's routed blocks among all of its blocks, counted from 0."""
    return range(block_names(routing).index("routed"), config.layers, routing.every)


def group_count(config: ModelConfig, routing: RoutingConfig) -> int:
    """Number of groups that the blocks are stacked over.

    Raises:
      InputError: `model.layers` is not a multiple of `routing.every`.
    """
    require_network(config, routing)
    return config.layers // len(block_names(routing))


def group_init(key: jax.Array, config: ModelConfig, routing: RoutingConfig, parts: Parts) -> dict[str, Any]:
    """Float32 parameters of one group of blocks."""
    params: dict[str, Any] = {}
    for name, block_key in zip(block_names(routing), jax.random.split(key, len(block_names(routing))), strict=True):
        params[name] = {"block": parts.block.init(block_key, config, parts)}
        if name == "routed":
            router, predictor = jax.random.split(jax.random.fold_in(block_key, random_streams.ROUTING_PARAMETERS))
            params[name]["router"] = parts.router.init(router, config)
            rule = parts.causal_rule_of(routing).init(predictor, config, routing)
            if jax.tree.leaves(rule):
                params[name]["predictor"] = rule
            adapter = parts.adapter_of(routing)
            if adapter is not None:
                skip = jax.random.fold_in(block_key, random_streams.SKIP_PATH)
                own = adapter.init(skip, config, routing)
                if jax.tree.leaves(own):
                    params[name]["adapter"] = own
    # A user's own initialiser may have left the type to a default, which JAX_ENABLE_X64 makes float64.
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


class Decoder(nn.Module):
    """A Llama-family decoder with Mixture-of-Depths blocks, for one sequence.

    Example:
      decoder = Decoder(ModelConfig(vocab_size=258), RoutingConfig())
      params = decoder.init(jax.random.key(0), tokens_S)["params"]
      output = jax.vmap(lambda tokens: decoder.apply({"params": params}, tokens))(tokens_BxS)

    Raises:
      InputError: on construction, if `config` and `routing` don't make a network together.
    """

    config: ModelConfig
    routing: RoutingConfig
    parts: Parts = DEFAULT_PARTS
    budget_over: Literal["sequence", "batch"] = "sequence"
    """Whose share of tokens a routed block computes: each sequence's, or that of all sequences of a `vmap` together."""

    def __post_init__(self) -> None:
        """Checks the configuration."""
        require_network(self.config, self.routing)
        if self.budget_over == "batch":
            require_poolable(self.routing, "budget_over", self.budget_over)
        super().__post_init__()

    def setup(self) -> None:
        """Makes the parameters; Flax calls it."""
        V, D = self.config.vocab_size, self.config.width
        require(V > 0, "model.vocab_size", V, "must be positive (0 is filled in from the tokenizer by a run)")
        self.embedding = self.param("embedding", lambda key: fan_in_normal(key, (V, D), D))
        require_merged(self.variables.get("params", {}))
        groups: Any = self.get_variable("params", "groups")
        adapted = any(map(is_adapted, jax.tree.leaves(groups, is_leaf=is_adapted)))
        # Flax would compare the leaves of adapted weights with those of plain ones.
        self.groups = groups if adapted else self.param("groups", self._init_groups)
        self.final_norm = self.param("final_norm", lambda key: jnp.ones(D, jnp.float32))
        if not self.config.tie_embeddings:
            self.head = self.param("head", lambda key: fan_in_normal(key, (V, D), D))

    def _init_groups(self, key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, group_count(self.config, self.routing))
        return jax.vmap(lambda k: group_init(k, self.config, self.routing, self.parts))(keys)

    def embed(self, tokens_S: jax.Array) -> jax.Array:
        """Embeddings SxD in the compute type."""
        return lookup(self.embedding, tokens_S).astype(self.config.dtype)

    def __call__(
        self,
        tokens_S: jax.Array,
        positions_S: jax.Array | None = None,
        segment_ids_S: jax.Array | None = None,
        *,
        mode: RoutingMode = "causal",
        slots: int | None = None,
        key: jax.Array | None = None,
        exploration: jax.Array | None = None,
        keep_keys_values: bool = False,
    ) -> Output:
        """Hidden states of a whole sequence.

        Args:
          tokens_S: int32 token ids.
          positions_S: int32 positions, restarting in each document; 0, 1, ... by default.
          segment_ids_S: int32 document ids, 0 for padding; one document by default.
          mode: causal: the rule that sees no later token, as in generation. top_k: expert choice among all tokens, as
            trained: later tokens decide with, so that a likelihood under it is none that sampling could reach.
          slots: slots of a routed block under the causal rule; those of the model's context by default, as in
            generation: they don't depend on how long the text is, or how padded.
          key: for stochastic routing and exploration only.
          exploration: float32 factor of `routing.noise` and `routing.explore`, in top_k mode. None: no exploration.
          keep_keys_values: return every block's keys/values, to fill a cache with.
        """
        S = tokens_S.shape[0]
        positions_S = jnp.arange(S, dtype=jnp.int32) if positions_S is None else positions_S
        segment_ids_S = jnp.ones(S, jnp.int32) if segment_ids_S is None else segment_ids_S
        params = {"groups": self.groups, "final_norm": self.final_norm}
        tokens = Tokens(self.embed(tokens_S), positions_S, segment_ids_S)
        call = RoutingCall(mode, slots, key, exploration=exploration)
        return apply_blocks(self, params, tokens, call, keep_keys_values=keep_keys_values)


def apply_blocks(
    decoder: Decoder,
    params: StackedParams | UnstackedParams,
    tokens: Tokens,
    call: RoutingCall | None = None,
    *,
    memory: Any = None,
    keep_keys_values: bool = True,
) -> Output:
    """All blocks and the final norm, on N tokens given as embeddings, which may have keys/values before them.

    Args:
      decoder: sizes and parts.
      params: its parameters, in either form; of unstacked ones everything is unrolled. Weights may be `Adapted`.
      tokens: embeddings, positions and documents.
      call: how the routed blocks decide; None: by the causal rule, with the slots of the model's context.
      memory: what the tokens attend to besides themselves: {block name: tuple of KeyValues}, the leaves stacked over
        groups, or a tuple with one such dict per group. With a memory, a single token is computed by a routed block
        only if it is routed, also under `vmap`.
      keep_keys_values: whether to return them.

    Raises:
      InputError: there is a memory, or keys/values are to be returned, and a batch shares the slots of routed blocks.

    Returns:
      Hidden states and routing; keys/values are stacked over groups, or a tuple as the params are.
    """
    require_merged(params)
    pooled = decoder.budget_over == "batch"
    allowed = "must be sequence for generation and thoughts, which need keys and values of each sequence"
    require(not pooled or (memory is None and not keep_keys_values), "budget_over", decoder.budget_over, allowed)
    config = decoder.config
    call = RoutingCall() if call is None else call

    def group(x_NxD: jax.Array, inputs: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        params, index, memory, taken, decided_N = inputs
        own_key = None if call.key is None else jax.random.fold_in(call.key, index)
        own_call = replace(call, key=own_key, taken=taken, decided=decided_N)
        own_tokens = replace(tokens, x_NxD=x_NxD)
        x_NxD, (trace, keys_values, load) = apply_group(decoder, params, own_tokens, own_call, memory, recompute=True)
        return x_NxD, (trace, keys_values if keep_keys_values else None, load)

    groups = params["groups"]
    count = group_count(config, decoder.routing)
    x_NxD = constrain(tokens.x_NxD, None, None)
    inputs = (groups, jnp.arange(count, dtype=jnp.int32), memory, call.taken, call.decided)
    if isinstance(groups, tuple):
        results = []
        for i in range(count):
            x_NxD, result = group(x_NxD, tuple(None if each is None else each[i] for each in inputs))
            results.append(result)
        stacked = [(trace, load) for trace, _, load in results]
        trace, load = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)
        keys_values = tuple(own for _, own, _ in results) if keep_keys_values else None
    elif config.scan:
        x_NxD, (trace, keys_values, load) = jax.lax.scan(group, x_NxD, inputs)
    else:
        results = []
        for i in range(count):
            x_NxD, result = group(x_NxD, jax.tree.map(lambda leaf, i=i: leaf[i], inputs))
            results.append(result)
        trace, keys_values, load = jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
    return Output(rms_norm(x_NxD, params["final_norm"], config.norm_eps), trace, keys_values, load)


def apply_group(
    decoder: Decoder,
    params: dict[str, Any],
    tokens: Tokens,
    call: RoutingCall,
    memory: dict[str, Any] | None = None,
    *,
    recompute: bool = False,
) -> tuple[jax.Array, tuple[Trace | None, dict[str, KeyValues | None], Load | None]]:
    """The blocks of one group.

    Args:
      decoder: sizes and parts.
      params: of the group.
      tokens: the stream before it, positions and documents.
      call: how its routed block decides; key, `taken` and `decided` are this group's.
      memory: as for `apply_blocks`, of the group.
      recompute: whether the backward pass recomputes of each block what `model.remat` says.

    Returns:
      The stream after it; the routed block's decisions, {block name: keys/values}, and load of the blocks' experts.
    """
    x_NxD, trace, loads = tokens.x_NxD, None, []
    keys_values: dict[str, KeyValues | None] = {}
    for name in block_names(decoder.routing):

        def block(params: dict[str, Any], x_NxD: jax.Array, memory: Any, name: str = name) -> Any:
            return _apply_block(decoder, name, params, replace(tokens, x_NxD=x_NxD), call, memory)

        if recompute:
            block = _recomputed(block, decoder.config)
        before = () if memory is None else memory[name]
        x_NxD, own_trace, keys_values[name], load = block(params[name], x_NxD, before)
        trace = trace if own_trace is None else own_trace
        if load is not None:
            loads.append(load)
    load = jax.tree.map(lambda *each: jnp.stack(each), *loads) if loads else None
    return x_NxD, (trace, keys_values, load)


def _recomputed(block: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    """A block of which the backward pass recomputes what `model.remat` says.

    Block by block, not group by group: at no time are the weights of two blocks put together on a device. A barrier
    keeps the compiler from computing two blocks' backward passes at a time. Without it a scan would be right, too, but
    a Mixture-of-Depths program for a v5e takes more memory (docs/results/plans.md, also for where it takes less).
    """
    if config.remat == "none":
        return block
    products = jax.checkpoint_policies.save_from_both_policies(linear_saveable, grouped_saveable)
    policies = {"dots": products, "full": None}
    return jax.checkpoint(block, policy=policies[config.remat])


def _apply_block(
    decoder: Decoder, name: str, params: dict[str, Any], tokens: Tokens, call: RoutingCall, memory: tuple[Any, ...]
) -> tuple[jax.Array, Trace | None, KeyValues | None, Load | None]:
    """The stream after a block; its decisions if it is routed, its keys/values, its experts' load."""
    x_NxD, trace = tokens.x_NxD, None
    own: KeyValues | None
    if name == "routed" and decoder.budget_over == "batch":
        delta_NxD, own, trace, load = pooled_block(decoder, params, tokens, call)
    elif name == "routed":
        delta_NxD, own, trace, load = routed_block(decoder, params, tokens, call, memory)
    else:
        positions_N, ids_N = tokens.positions_N, tokens.segment_ids_N
        delta_NxD, own, load = decoder.parts.compute_block(
            params["block"], x_NxD, positions_N, ids_N, ids_N > 0, memory, decoder.config
        )
    # Said once per block, so that tokens stay where they are and weights move: `mod_star.distributed.sharding`.
    return constrain(x_NxD + delta_NxD, None, None), trace, own, load


def head_matrix(params: dict[str, Any]) -> jax.Array:
    """The LM head VxD, float32 or in 8 bits: the embedding where they are tied."""
    return params["head"] if "head" in params else params["embedding"]


def logits_of(params: dict[str, Any], hidden_NxD: jax.Array) -> jax.Array:
    """Float32 logits NxV. The head is read in the hidden states' type."""
    head_VxD = head_matrix(params).astype(hidden_NxD.dtype)
    return linear(hidden_NxD, head_VxD, jnp.float32, transposed=True, precision="highest")

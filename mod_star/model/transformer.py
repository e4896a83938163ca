"""The decoder: embedding, groups of (full blocks, one routed block), final norm. Written for one sequence; vmap it.

Parameters are a plain nested dict. The blocks' are stacked over groups, {"groups": {"full_0": ..., "routed": ...}},
and applied by `lax.scan`, so that compile time does not grow with depth.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from mod_star import random_streams
from mod_star.config import ModelConfig, RoutingConfig
from mod_star.distributed.sharding import constrain
from mod_star.errors import InputError, require
from mod_star.model.attention import KeyValues
from mod_star.model.layers import fan_in_normal, lookup, rms_norm
from mod_star.model.linear import linear, linear_saveable
from mod_star.model.parts import DEFAULT_PARTS, Parts
from mod_star.model.routing import (
    Selection,
    causal_slots,
    combine,
    dispatch,
    noise_threshold,
    position_noise,
    predict,
    predictor_init,
    routed_share,
    select_first,
    select_share,
)
from mod_star.model.rows import compute_if
from mod_star.network_config import require_network

RoutingMode = Literal["top_k", "causal"]


@struct.dataclass
class Trace:
    """What the routed blocks decided; each array is [groups, S]."""

    scores: jax.Array
    """float32 router scores r."""
    selected: jax.Array
    """bool; the tokens that were computed."""
    gates: jax.Array
    """float32 gate of the selected tokens, 0 elsewhere."""
    logits: jax.Array
    """float32 logit of the causal rule: positive means "compute this token"."""
    overflow: jax.Array
    """bool; tokens that the causal rule wanted but no slot was left for."""


@struct.dataclass
class Output:
    """What `Decoder` returns for one sequence."""

    hidden: jax.Array
    """SxD after the final norm, in the compute type; times the LM head gives logits."""
    trace: Trace | None
    """Routing decisions; None for a dense model."""
    keys_values: Any
    """{block name: KeyValues} stacked over groups; from unrolled groups a tuple of such; None unless asked for."""


def block_names(routing: RoutingConfig) -> tuple[str, ...]:
    """Names of the blocks of one group, in order: full_0, ..., routed."""
    if routing.every == 0:
        return ("full_0",)
    return (*(f"full_{i}" for i in range(routing.every - 1)), "routed")


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
            if routing.selection == "learned" and routing.causal_rule == "predictor":
                params[name]["predictor"] = predictor_init(predictor, config, routing)
    # A user's own initialiser may have left the type to a default, which JAX_ENABLE_X64 makes float64.
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def causal_logit(
    params: dict[str, Any],
    x_SxD: jax.Array,
    scores_S: jax.Array,
    noise_S: jax.Array | None,
    routing: RoutingConfig,
    tokens: int,
) -> jax.Array:
    """Float32 logit of the causal rule for each token, from that token alone: positive means "compute it".

    Args:
      params: the routed block's.
      x_SxD: the stream before the block.
      scores_S: router scores.
      noise_S: the noise of stochastic routing, None when routing is learned.
      routing: names the rule.
      tokens: the context length, which sets the share that stochastic routing takes.
    """
    if noise_S is not None:
        return noise_S - noise_threshold(routing, tokens)
    return predict(params["predictor"], x_SxD) if routing.causal_rule == "predictor" else scores_S


def stochastic_noise(key: jax.Array | None, positions_S: jax.Array, routing: RoutingConfig) -> jax.Array | None:
    """The noise that stochastic routing selects by, or None when routing is learned."""
    if routing.selection == "learned":
        return None
    if key is None:
        raise InputError("routing.selection = 'stochastic': needs a key")
    return position_noise(key, positions_S)


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

    def __post_init__(self) -> None:
        """Checks the configuration."""
        require_network(self.config, self.routing)
        super().__post_init__()

    def setup(self) -> None:
        """Makes the parameters; Flax calls it."""
        V, D = self.config.vocab_size, self.config.width
        require(V > 0, "model.vocab_size", V, "must be positive (0 is filled in from the tokenizer by a run)")
        self.embedding = self.param("embedding", lambda key: fan_in_normal(key, (V, D), D))
        self.groups = self.param("groups", self._init_groups)
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
          key: for stochastic routing only.
          keep_keys_values: return every block's keys/values, to fill a cache with.
        """
        S = tokens_S.shape[0]
        positions_S = jnp.arange(S, dtype=jnp.int32) if positions_S is None else positions_S
        segment_ids_S = jnp.ones(S, jnp.int32) if segment_ids_S is None else segment_ids_S
        params = {"groups": self.groups, "final_norm": self.final_norm}
        return apply_blocks(
            self, params, self.embed(tokens_S), positions_S, segment_ids_S, mode=mode, slots=slots, key=key,
            keep_keys_values=keep_keys_values,
        )  # fmt: skip


def apply_blocks(
    decoder: Decoder,
    params: dict[str, Any],
    x_NxD: jax.Array,
    positions_N: jax.Array,
    segment_ids_N: jax.Array,
    *,
    mode: RoutingMode = "causal",
    slots: int | None = None,
    key: jax.Array | None = None,
    memory: Any = None,
    taken: Any = None,
    decided: jax.Array | None = None,
    keep_keys_values: bool = True,
) -> Output:
    """All blocks and the final norm, on N tokens given as embeddings, which may have keys/values before them.

    Args:
      decoder: sizes and parts.
      params: its parameters; the groups stacked, or a tuple with one dict per group (then everything is unrolled).
      x_NxD: embeddings in the compute type.
      positions_N: int32 positions in the document.
      segment_ids_N: int32 document ids, 0 for padding.
      mode: as for `Decoder`.
      slots: of a routed block under the causal rule: the most tokens that it may compute; those of the model's
        context by default.
      key: for stochastic routing only.
      memory: what the tokens attend to besides themselves: {block name: tuple of KeyValues}, the leaves stacked over
        groups, or a tuple with one such dict per group. With a memory, a single token is computed by a routed block
        only if it is routed, also under `vmap`.
      taken: int32 slots that earlier tokens have taken, an array [groups] or a tuple; none by default.
      decided: int8 [groups, N], routing decisions to repeat: 1 computed, 0 passed by, -1 the causal rule decides.
      keep_keys_values: whether to return them.

    Returns:
      Hidden states and routing; keys/values are stacked over groups, or a tuple as the params are.
    """
    config, routing = decoder.config, decoder.routing
    names = block_names(routing)
    slots = causal_slots(routing, config.context) if slots is None else slots

    def group(x_NxD: jax.Array, inputs: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        params, index, memory, taken, decided_N = inputs
        keys_values, trace = {}, None
        for name in names:
            before = () if memory is None else memory[name]
            if name == "routed":
                group_key = None if key is None else jax.random.fold_in(key, index)
                delta, keys_values[name], trace = routed_block(
                    decoder, params[name], x_NxD, positions_N, segment_ids_N, mode=mode, slots=slots, key=group_key,
                    memory=before, taken=taken, decided_N=decided_N,
                )  # fmt: skip
            else:
                delta, keys_values[name] = decoder.parts.compute_block(
                    params[name]["block"], x_NxD, positions_N, segment_ids_N, segment_ids_N > 0, before, config
                )
            # Said once per block, so that tokens stay where they are and weights move: `mod_star.distributed.sharding`.
            x_NxD = constrain(x_NxD + delta, None, None)
        return x_NxD, (trace, keys_values if keep_keys_values else None)

    if config.remat != "none":
        policies = {"dots": linear_saveable, "full": None}
        group = jax.checkpoint(group, policy=policies[config.remat], prevent_cse=not config.scan)
    groups = params["groups"]
    count = group_count(config, routing)
    x_NxD = constrain(x_NxD, None, None)
    inputs = (groups, jnp.arange(count, dtype=jnp.int32), memory, taken, decided)
    if isinstance(groups, tuple):
        results = []
        for i in range(count):
            x_NxD, result = group(x_NxD, tuple(None if each is None else each[i] for each in inputs))
            results.append(result)
        trace = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[trace for trace, _ in results])
        keys_values = tuple(own for _, own in results) if keep_keys_values else None
    elif config.scan:
        x_NxD, (trace, keys_values) = jax.lax.scan(group, x_NxD, inputs)
    else:
        results = []
        for i in range(count):
            x_NxD, result = group(x_NxD, jax.tree.map(lambda leaf, i=i: leaf[i], inputs))
            results.append(result)
        trace, keys_values = jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
    return Output(rms_norm(x_NxD, params["final_norm"], config.norm_eps), trace, keys_values)


def routed_block(
    decoder: Decoder,
    params: dict[str, Any],
    x_SxD: jax.Array,
    positions_S: jax.Array,
    segment_ids_S: jax.Array,
    *,
    mode: RoutingMode,
    slots: int,
    key: jax.Array | None = None,
    memory: tuple[KeyValues, ...] = (),
    taken: jax.Array | None = None,
    decided_N: jax.Array | None = None,
) -> tuple[jax.Array, KeyValues, Trace]:
    """The gated delta of a routed block, SxD, zero where tokens pass by; arguments as for `apply_blocks`."""
    config, routing, parts = decoder.config, decoder.routing, decoder.parts
    S = x_SxD.shape[0]
    valid_S = segment_ids_S > 0
    scores_S = parts.score(params["router"], x_SxD)
    noise_S = stochastic_noise(key, jnp.arange(S, dtype=jnp.int32), routing)
    logits_S = causal_logit(params, x_SxD, scores_S, noise_S, routing, config.context)
    if mode == "top_k":
        selection = select_share(scores_S if noise_S is None else noise_S, valid_S, routing)
        overflow_S = jnp.zeros(S, bool)
    else:
        rule_S = (logits_S > 0) & valid_S
        wanted_S = rule_S if decided_N is None else jnp.where(decided_N < 0, rule_S, decided_N > 0)
        room = slots if taken is None else slots - taken
        selection = select_first(wanted_S & (jnp.cumsum(wanted_S, dtype=jnp.int32) <= room), min(S, slots))
        overflow_S = rule_S & ~selection.mask_S  # also where a repeated decision was that no slot was left

    rows = functools.partial(routed_rows, config=config, routing=routing, parts=parts)

    arrays = (
        params, dispatch(x_SxD, selection), dispatch(scores_S, selection), dispatch_ids(positions_S, selection),
        dispatch_ids(segment_ids_S, selection), selection.filled_C, memory,
    )  # fmt: skip
    if memory and S == 1:
        share = routed_share(routing, config.context)
        gated_CxD, gates_C, own = compute_if(selection.filled_C[0], rows, arrays, share)
    else:
        gated_CxD, gates_C, own = rows(*arrays)
    trace = Trace(scores_S, selection.mask_S, combine(gates_C, selection), logits_S, overflow_S)
    return combine(gated_CxD, selection), own, trace


def dispatch_ids(ids_S: jax.Array, selection: Selection) -> jax.Array:
    """`dispatch` for integers, which have no gradient: int32 C, 0 in empty slots."""
    return jnp.where(selection.filled_C, ids_S[selection.indices_C], 0)


def routed_rows(
    params: dict[str, Any],
    x_CxD: jax.Array,
    scores_C: jax.Array,
    positions_C: jax.Array,
    segment_ids_C: jax.Array,
    filled_C: jax.Array,
    memory: tuple[KeyValues, ...],
    config: ModelConfig,
    routing: RoutingConfig,
    parts: Parts,
) -> tuple[jax.Array, jax.Array, KeyValues]:
    """g(r)·f(x) of the rows that a routed block computes (section 3.3 of the paper).

    Returns:
      The gated delta CxD in x's type, the float32 gates C, and the rows' keys/values.
    """
    delta_CxD, own = parts.compute_block(params["block"], x_CxD, positions_C, segment_ids_C, filled_C, memory, config)
    gates_C = parts.gate_of(routing)(scores_C)
    return (delta_CxD * gates_C[:, None]).astype(x_CxD.dtype), gates_C, own


def head_matrix(params: dict[str, Any]) -> jax.Array:
    """The LM head VxD, float32: the embedding where they are tied."""
    return params["head"] if "head" in params else params["embedding"]


def logits_of(params: dict[str, Any], hidden_NxD: jax.Array) -> jax.Array:
    """Float32 logits NxV. The head is read in the hidden states' type."""
    head_VxD = head_matrix(params).astype(hidden_NxD.dtype)
    return linear(hidden_NxD, head_VxD, jnp.float32, transposed=True, precision="highest")

"""The two compiled programs of generation: `prefill` runs the prompts, `advance` is a loop over a documented state.

Both belong to no generator: what they are compiled for is static and compared by value (the network, the shapes, how
tokens are drawn, whether it thinks), everything else is data. So all generators of equal networks share their programs.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star import random_streams
from mod_star.config import ThinkingConfig
from mod_star.decoding.caches import Cache, cached_memory, full_cache, in_place_options, routed_cache
from mod_star.decoding.confidence import no_confidence, token_confidence
from mod_star.decoding.sampling import Sampling, draw, log_prob_and_gap, ranked_tokens
from mod_star.decoding.state import DecodeState
from mod_star.decoding.step import NewTokens, decode_step
from mod_star.decoding.think import LastTokens, Think, ThoughtRecord, empty_record, think_step
from mod_star.model import Decoder
from mod_star.model.layers import lookup
from mod_star.model.routing import RoutingCall, Tokens, causal_slots
from mod_star.model.transformer import UnstackedParams, apply_blocks, block_names, logits_of

Data = Any
"""An array, of NumPy outside of programs and of JAX inside."""


@struct.dataclass
class Prompts:
    """A batch of prompts, padded; the last ones may be there to fill it up alone."""

    tokens_QxP: Data
    """int32."""
    lengths_Q: Data
    """int32, at least 1."""
    rows_B: Data
    """uint32 number of each row, which its random key comes from."""
    count: Data
    """int32 prompts that count."""
    limit: Data
    """int32 most new tokens per row."""
    seed: Data
    """The key that all rows' keys come from."""


@struct.dataclass
class Bounds:
    """What a call of `advance` is told as data."""

    until: Data
    """int32 tokens per row."""
    threshold: Data
    """float32, in place of `Think.threshold`."""
    temperature: Data
    """float32, in place of `Sampling.temperature` where that is not 0."""
    top_p: Data
    """float32, in place of `Sampling.top_p` where that is not 1."""
    min_p: Data
    """float32, in place of `Sampling.min_p` where that is not 0."""
    ends_E: Data
    """int32 tokens that end a row; -1, which no token is, fills it up."""


@functools.partial(jax.jit, static_argnames=("decoder", "thinking", "room", "branches", "confidence"))
def prefill(
    decoder: Decoder,
    thinking: ThinkingConfig | None,
    params: UnstackedParams,
    prompts: Prompts,
    routing_key: jax.Array | None,
    *,
    room: int,
    branches: int = 1,
    confidence: bool = False,
) -> DecodeState:
    """Runs prompts and returns the state before the first new token.

    Args:
      decoder: the model.
      thinking: of a model that can think, which needs a record of its thoughts; else None.
      params: from `mod_star.decoding.step.own_params`.
      prompts: the batch.
      routing_key: of stochastic routing, or None.
      room: slots for new tokens (T), at least as many as `prompts.limit`.
      branches: rows per prompt.
      confidence: have the steps measure the confidence in each token.
    """
    Q, P = prompts.tokens_QxP.shape
    B = Q * branches
    lengths_Q = prompts.lengths_Q
    segment_ids_QxP = (jnp.arange(P, dtype=jnp.int32) < lengths_Q[:, None]).astype(jnp.int32)
    positions_P = jnp.arange(P, dtype=jnp.int32)
    # The slots do not depend on how prompts are padded, so neither does what is generated.
    slots = causal_slots(decoder.routing, decoder.config.context)

    def one(tokens_P: jax.Array, segment_ids_P: jax.Array) -> Any:
        x_PxD = lookup(params["embedding"], tokens_P).astype(decoder.config.dtype)
        tokens = Tokens(x_PxD, positions_P, segment_ids_P)
        return apply_blocks(decoder, params, tokens, RoutingCall(slots=slots, key=routing_key))

    output = jax.vmap(one)(prompts.tokens_QxP, segment_ids_QxP)
    caches: list[Cache] = []
    for group, keys_values in enumerate(output.keys_values):
        for name in block_names(decoder.routing):
            if name == "routed":
                overflow_Q = jnp.sum(output.trace.overflow[:, group], -1, dtype=jnp.int32)
                computed_Q = None
                if decoder.routing.keep_key_values:
                    computed_Q = jnp.sum(output.trace.selected[:, group], -1, dtype=jnp.int32)
                caches.append(routed_cache(keys_values[name], overflow_Q, slots, room, branches, computed_Q))
            else:
                caches.append(full_cache(keys_values[name], room, branches))
    last_QxD = jnp.take_along_axis(output.hidden, (lengths_Q - 1)[:, None, None], 1)[:, 0]
    return DecodeState(
        caches=tuple(caches),
        hidden_BxD=jnp.repeat(last_QxD, branches, 0),
        tokens_BxT=jnp.full((B, room), -1, jnp.int32),
        log_probs_BxT=jnp.zeros((B, room), jnp.float32),
        gaps_BxT=jnp.zeros((B, room), jnp.float32),
        step=jnp.zeros((), jnp.int32),
        limit=prompts.limit,
        count=prompts.count,
        done_B=jnp.arange(B, dtype=jnp.int32) >= prompts.count * branches,
        lengths_B=jnp.repeat(lengths_Q, branches),
        keys_B=jax.vmap(functools.partial(jax.random.fold_in, prompts.seed))(prompts.rows_B),
        confidence=no_confidence(B, room) if confidence else None,
        record=None if thinking is None else empty_record(B, room, thinking),
        branches=branches,
    )


def _advance(
    decoder: Decoder,
    thinking: ThinkingConfig | None,
    params: UnstackedParams,
    state: DecodeState,
    bounds: Bounds,
    routing_key: jax.Array | None,
    *,
    sampling: Sampling,
    think: Think,
) -> DecodeState:
    """Generates until `bounds.until` tokens per row exist, or as many as there may be, or every row is finished.

    Args:
      decoder: the model.
      thinking: as for `prefill`.
      params: as for `prefill`.
      state: of a batch.
      bounds: everything that is data.
      routing_key: as for `prefill`.
      sampling: how to draw; its numbers are in `bounds`.
      think: when and how to think; its threshold is in `bounds`.
    """

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < jnp.minimum(bounds.until, state.limit)) & ~jnp.all(state.done_B)

    def one_token(state: DecodeState) -> DecodeState:
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, state.step))(state.keys_B)
        if think.when == "never":
            logits_BxV, thoughts = logits_of(params, state.hidden_BxD), None
        else:
            assert thinking is not None
            logits_BxV, thoughts = think_in(decoder, thinking, params, state, think, bounds.threshold)
        numbers = (bounds.temperature, bounds.top_p, bounds.min_p)
        tokens_B = jax.vmap(functools.partial(draw, sampling=sampling, numbers=numbers))(keys_B, logits_BxV)
        if sampling.branch:
            ranked = functools.partial(ranked_tokens, logits_BxV, state.branches)
            tokens_B = jax.lax.cond(state.step == 0, ranked, lambda: tokens_B)
        log_probs_B, gaps_B = log_prob_and_gap(logits_BxV, tokens_B)
        ends_B = state.done_B | jnp.any(tokens_B[:, None] == bounds.ends_E, -1)
        new = NewTokens(tokens_B, state.lengths_B, state.step, ~ends_B)
        hidden_BxD, caches = decode_step(decoder, params, state.caches, new, state.branches, routing_key)

        def write(buffer: jax.Array, values: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, values[:, None], state.step, 1)

        def column(buffer: jax.Array, values_B: jax.Array, none: float) -> jax.Array:
            return write(buffer, jnp.where(state.done_B, none, values_B).astype(buffer.dtype))

        confidence = state.confidence
        if confidence is not None:
            confidence = jax.tree.map(lambda a, b: column(a, b, 0.0), confidence, token_confidence(logits_BxV))
        return replace(
            state,
            caches=caches,
            hidden_BxD=hidden_BxD,
            tokens_BxT=column(state.tokens_BxT, tokens_B, -1),
            log_probs_BxT=column(state.log_probs_BxT, log_probs_B, 0.0),
            gaps_BxT=column(state.gaps_BxT, gaps_B, 0.0),
            step=state.step + 1,
            done_B=ends_B,
            confidence=confidence,
            record=state.record if thoughts is None else jax.tree.map(write, state.record, thoughts),
        )

    return jax.lax.while_loop(unfinished, one_token, state)


@functools.cache
def advance_program() -> Any:
    """`_advance` under jit; consumes the state. Made at its first use: only then may JAX look for devices."""
    return jax.jit(
        _advance,
        static_argnames=("decoder", "thinking", "sampling", "think"),
        donate_argnames=("state",),
        compiler_options=in_place_options(),
    )


def think_in(
    decoder: Decoder,
    thinking: ThinkingConfig,
    params: UnstackedParams,
    state: DecodeState,
    think: Think,
    threshold: jax.Array | float,
) -> tuple[jax.Array, ThoughtRecord]:
    """Logits and record of the next step, see `think_step`."""

    def key_of(key: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, random_streams.THOUGHTS), state.step)

    memory = cached_memory(decoder.routing, state.caches, state.lengths_B, state.step)
    positions_B, keys_B = state.lengths_B + state.step - 1, jax.vmap(key_of)(state.keys_B)
    last = LastTokens(state.hidden_BxD, memory, positions_B, keys_B, ~state.done_B)
    return think_step(decoder, params, thinking, think, threshold, last, state.branches)

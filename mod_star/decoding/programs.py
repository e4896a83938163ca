"""The compiled programs of generation: `prefill` runs the prompts, `advance` is a loop over a documented state.

`prefill` calls one small program for each group of blocks. All groups share it, so that a new length of prompts takes
a fraction of a second to compile. `advance` has all blocks in one program, which takes seconds, and so that there are
few of them its shapes are coarse, see `mod_star.decoding.lengths`.

They belong to no generator: what they are compiled for is static and compared by value (the network, the shapes, how
tokens are drawn, whether it thinks), everything else is data. So all generators of equal networks share their programs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mod_star import random_streams
from mod_star.config import ThinkingConfig
from mod_star.decoding.caches import (
    Cache,
    cached_memory,
    full_cache,
    in_bits,
    in_place_options,
    in_values,
    routed_cache,
    with_slots,
)
from mod_star.decoding.choosing import Bounds as Bounds  # what a caller of `advance` gives
from mod_star.decoding.choosing import Data, choose
from mod_star.decoding.confidence import no_confidence
from mod_star.decoding.own_pace import advance_at_own_pace
from mod_star.decoding.sampling import Sampling
from mod_star.decoding.state import DecodeState
from mod_star.decoding.step import NewTokens, decode_step
from mod_star.decoding.think import LastTokens, Think, ThoughtRecord, empty_record, think_step
from mod_star.distributed.sharding import constrain
from mod_star.model import Decoder
from mod_star.model.layers import lookup, rms_norm
from mod_star.model.routing import RoutingCall, Tokens, causal_slots
from mod_star.model.transformer import UnstackedParams, apply_group, block_names, logits_of


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


@dataclass(frozen=True)
class Size:
    """The sizes of a batch's state, which programs are compiled for."""

    prompt: int
    """Slots for a prompt's keys and values, at least as many as prompts are padded to."""
    room: int
    """Slots for new tokens (T), at least `Prompts.limit`."""
    branches: int = 1
    """Rows per prompt."""
    confidence: bool = False
    """Whether the steps measure the confidence in each token."""


def prefill(
    decoder: Decoder,
    thinking: ThinkingConfig | None,
    params: UnstackedParams,
    prompts: Prompts,
    routing_key: jax.Array | None,
    *,
    size: Size,
    ahead: bool = False,
) -> DecodeState:
    """Runs prompts and returns the state before the first new token.

    Args:
      decoder: the model.
      thinking: of a model that can think, which needs a record of its thoughts; else None.
      params: from `mod_star.decoding.step.own_params`.
      prompts: the batch.
      routing_key: of stochastic routing, or None.
      size: of the state.
      ahead: run nothing, compile what a call would run and return the state's shapes. Then shapes will do as params.
    """

    def run(program: Any, *args: Any, **static: Any) -> Any:
        if not ahead:
            return program(*args, **static)
        lowered = program.lower(*args, **static)
        lowered.compile()  # JAX keeps it for calls of these shapes
        return lowered.out_info

    x_QxPxD = run(_embedded, params["embedding"], prompts.tokens_QxP, dtype=decoder.config.dtype)
    caches: list[Cache] = []
    for index, group in enumerate(params["groups"]):
        arrays = (group, x_QxPxD, prompts.lengths_Q, np.int32(index), routing_key)
        x_QxPxD, own = run(prefill_group, decoder, *arrays, size=size)
        caches += own
    state = run(_first_state, decoder, thinking, params["final_norm"], x_QxPxD, prompts, size=size)
    return replace(state, caches=tuple(caches))


@functools.partial(jax.jit, static_argnames=("dtype",))
def _embedded(embedding_VxD: Any, tokens_QxP: jax.Array, *, dtype: str) -> jax.Array:
    return jax.vmap(lambda tokens_P: lookup(embedding_VxD, tokens_P).astype(dtype))(tokens_QxP)


@functools.partial(jax.jit, static_argnames=("decoder", "size"))
def prefill_group(
    decoder: Decoder,
    group: dict[str, Any],
    x_QxPxD: jax.Array,
    lengths_Q: jax.Array,
    index: jax.Array,
    routing_key: jax.Array | None,
    *,
    size: Size,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """The blocks of one group on the prompts.

    Args:
      decoder: the model.
      group: the group's params.
      x_QxPxD: the stream before it.
      lengths_Q: int32 lengths of the prompts.
      index: int32 number of the group.
      routing_key: as for `prefill`.
      size: of the caches.

    Returns:
      The stream after it, and the caches of its blocks.
    """
    P, branches = x_QxPxD.shape[1], size.branches
    positions_P = jnp.arange(P, dtype=jnp.int32)
    segment_ids_QxP = (positions_P < lengths_Q[:, None]).astype(jnp.int32)
    # The slots do not depend on how prompts are padded, so neither does what is generated.
    slots = causal_slots(decoder.routing, decoder.config.context)
    key = None if routing_key is None else jax.random.fold_in(routing_key, index)

    def one(x_PxD: jax.Array, segment_ids_P: jax.Array) -> Any:
        tokens = Tokens(constrain(x_PxD, None, None), positions_P, segment_ids_P)
        return apply_group(decoder, group, tokens, RoutingCall(slots=slots, key=key))

    x_QxPxD, (trace, keys_values, _) = jax.vmap(one)(x_QxPxD, segment_ids_QxP)
    caches: list[Cache] = []
    for name in block_names(decoder.routing):
        if name == "routed":
            overflow_Q = jnp.sum(trace.overflow, -1, dtype=jnp.int32)
            kept, computed_Q = decoder.routing.keep_key_values, None
            if kept:
                computed_Q = jnp.sum(trace.selected, -1, dtype=jnp.int32)
            prompt = keys_values[name]
            if branches > 1 or kept:
                prompt = with_slots(prompt, size.prompt if kept else min(size.prompt, slots))
            caches.append(routed_cache(prompt, overflow_Q, slots, size.room, branches, computed_Q))
        else:
            caches.append(full_cache(with_slots(keys_values[name], size.prompt), size.room, branches))
    return x_QxPxD, tuple(caches)


@functools.partial(jax.jit, static_argnames=("decoder", "thinking", "size"))
def _first_state(
    decoder: Decoder,
    thinking: ThinkingConfig | None,
    final_norm_D: jax.Array,
    x_QxPxD: jax.Array,
    prompts: Prompts,
    *,
    size: Size,
) -> DecodeState:
    """The state after the last group, but for the caches."""
    lengths_Q, room, branches = prompts.lengths_Q, size.room, size.branches
    B = len(lengths_Q) * branches
    last_QxD = jnp.take_along_axis(x_QxPxD, (lengths_Q - 1)[:, None, None], 1)[:, 0]
    return DecodeState(
        caches=(),
        hidden_BxD=jnp.repeat(rms_norm(last_QxD, final_norm_D, decoder.config.norm_eps), branches, 0),
        tokens_BxT=jnp.full((B, room), -1, jnp.int32),
        log_probs_BxT=jnp.zeros((B, room), jnp.float32),
        gaps_BxT=jnp.zeros((B, room), jnp.float32),
        step=jnp.zeros((), jnp.int32),
        limit=prompts.limit,
        count=prompts.count,
        done_B=jnp.arange(B, dtype=jnp.int32) >= prompts.count * branches,
        lengths_B=jnp.repeat(lengths_Q, branches),
        keys_B=jax.vmap(functools.partial(jax.random.fold_in, prompts.seed))(prompts.rows_B),
        confidence=no_confidence(B, room) if size.confidence else None,
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
    if think.when == "auto" and state.done_B.shape[0] > 1:
        assert thinking is not None
        return advance_at_own_pace(decoder, thinking, params, state, bounds, sampling, think)

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.step < jnp.minimum(bounds.until, state.limit)) & ~jnp.all(state.done_B)

    def one_token(state: DecodeState) -> DecodeState:
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, state.step))(state.keys_B)
        if think.when == "never":
            logits_BxV, thoughts = logits_of(params, state.hidden_BxD), None
        else:
            assert thinking is not None
            logits_BxV, thoughts = think_in(decoder, thinking, params, state, think, bounds.threshold)
        chosen = choose(
            logits_BxV, keys_B, state.step == 0, sampling, bounds, state.branches, state.confidence is not None
        )
        ends_B = state.done_B | chosen.ends_B
        new = NewTokens(chosen.tokens_B, state.lengths_B, state.step, ~ends_B)
        hidden_BxD, caches = decode_step(decoder, params, state.caches, new, state.branches, routing_key)

        def write(buffer: jax.Array, values: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, values[:, None], state.step, 1)

        def column(buffer: jax.Array, values_B: jax.Array, none: float) -> jax.Array:
            return write(buffer, jnp.where(state.done_B, none, values_B).astype(buffer.dtype))

        confidence = state.confidence
        if confidence is not None:
            confidence = jax.tree.map(lambda a, b: column(a, b, 0.0), confidence, chosen.confidence)
        return replace(
            state,
            caches=caches,
            hidden_BxD=hidden_BxD,
            tokens_BxT=column(state.tokens_BxT, chosen.tokens_B, -1),
            log_probs_BxT=column(state.log_probs_BxT, chosen.log_probs_B, 0.0),
            gaps_BxT=column(state.gaps_BxT, chosen.gaps_B, 0.0),
            step=state.step + 1,
            done_B=ends_B,
            confidence=confidence,
            record=state.record if thoughts is None else jax.tree.map(write, state.record, thoughts),
        )

    return jax.lax.while_loop(unfinished, one_token, state)


@functools.wraps(_advance)
def _advance_in_bits(*args: Any, **static: Any) -> DecodeState:
    """`_advance` with caches that XLA's CPU compiler can update in place."""
    decoder, thinking, params, state, *data = args
    state = replace(state, caches=in_bits(state.caches))
    state = _advance(decoder, thinking, params, state, *data, **static)
    return replace(state, caches=in_values(state.caches))


@functools.cache
def advance_program() -> Any:
    """`_advance` under jit; consumes the state. Made at its first use: only then may JAX look for devices."""
    return jax.jit(
        _advance_in_bits if jax.default_backend() == "cpu" else _advance,
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

"""Scoring a thought: <start> thought <end> continuation, differentiable, against the text's keys/values.

A thought of drawn tokens is scored in one pass. The steps of a latent thought need each other's hidden states: they run
one after another, and the gradient goes back through them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.model import Trace
from mod_star.model.layers import lookup
from mod_star.model.parts import LatentInput
from mod_star.model.routing import RoutingCall, Tokens
from mod_star.model.transformer import apply_blocks
from mod_star.thinking.sample import Place, ThinkingDecoder, memory_before
from mod_star.thinking.steps import empty_cache, join, slots_taken, thought_step
from mod_star.thinking.thought import Thought, embed_tokens, feed_back, thought_input


@struct.dataclass
class Scored:
    """Hidden states (after the final norm, in the compute type) of one thought and what follows it."""

    thought_TxD: jax.Array
    """Each predicts the thought token of its index, if there is one; the first is at <start>."""
    talk_NxD: jax.Array
    """Each predicts a token of the text after the thought; the first is at <end>. N is n_true."""
    trace: Trace | None
    """Routing of all t + 1 + n_true tokens, [groups, t + 1 + n_true]; None for a dense model."""


def score_thought(
    thinker: ThinkingDecoder, params: dict[str, Any], memory: Any, place: Place, thought: Thought, following: jax.Array
) -> Scored:
    """Runs [<start>; thought; <end>; following] after a place. Positions go on counting through all of it.

    Args:
      thinker: the model, and how it thinks; routed blocks repeat for the thought what they decided when it was sampled
        (they decide about a latent thought here).
      params: with the entry "thinking".
      memory: as for `sample_thought`.
      place: that the thought comes after.
      thought: from `sample_thought`; nothing of a latent one is read.
      following: int32, the next n_true - 1 tokens of the text (teacher forcing).

    Raises:
      InputError: a user's part of thinking is wrong.
    """
    decoder, thinking = thinker.decoder, thinker.thinking
    t, own = thinking.thought_length, params["thinking"]
    used = thought_input(decoder.parts, thinking)
    memory = memory_before(memory, place.position)
    if isinstance(used, LatentInput):
        return _score_latent(used, thinker, params, memory, place, following)
    thought_TxD = embed_tokens(used, params, thought.tokens_T, thought.extra_T)
    x_NxD = jnp.concatenate([own["start"][None], thought_TxD, own["end"][None], lookup(params["embedding"], following)])
    N = x_NxD.shape[0]
    decided = None
    if thought.decided_GxT is not None:
        decided = jnp.pad(thought.decided_GxT, ((0, 0), (0, N - t)), constant_values=-1)
    call = RoutingCall(slots=thinker.thought_slots, decided=decided)
    output = apply_blocks(
        decoder, params, _tokens(thinker, place, x_NxD, 0), call, memory=memory, keep_keys_values=False
    )
    return Scored(output.hidden[:t], output.hidden[t + 1 :], output.trace)


def _score_latent(
    latent: LatentInput, thinker: ThinkingDecoder, params: dict[str, Any], memory: Any, place: Place,
    following: jax.Array,
) -> Scored:  # fmt: skip
    """Of a latent thought: t steps, then its last input, <end> and what follows in one pass.

    The backward pass computes each step again, so that of all steps no more is kept than what they start from: an input
    and the thought's own keys/values, t times.
    """
    decoder, t, slots = thinker.decoder, thinker.thinking.thought_length, thinker.thought_slots
    own = params["thinking"]

    def think(carry: tuple[jax.Array, Any], i: jax.Array) -> tuple[tuple[jax.Array, Any], Any]:
        x_D, cache = carry
        token = _tokens(thinker, place, x_D[None], i)
        output, cache = thought_step(decoder, params, memory, token, cache, slots, with_gradient=True)
        hidden_D = output.hidden[0]
        return (feed_back(latent, params, hidden_D), cache), (hidden_D, output.trace)

    (x_D, cache), (thought_TxD, thought_trace) = jax.lax.scan(
        jax.checkpoint(think, prevent_cse=False), (own["start"], empty_cache(memory, t)), jnp.arange(t, dtype=jnp.int32)
    )
    x_NxD = jnp.concatenate([x_D[None], own["end"][None], lookup(params["embedding"], following)])
    call = RoutingCall(slots=slots, taken=slots_taken(cache))
    output = apply_blocks(
        decoder, params, _tokens(thinker, place, x_NxD, t), call, memory=join(memory, cache["blocks"]),
        keep_keys_values=False,
    )  # fmt: skip
    trace = output.trace
    if trace is not None:  # of the steps [t, groups, 1], of the pass [groups, n_true + 1]
        trace = jax.tree.map(lambda a, b: jnp.concatenate([a[..., 0].T, b], -1), thought_trace, trace)
    return Scored(thought_TxD, output.hidden[1:], trace)


def _tokens(thinker: ThinkingDecoder, place: Place, x_NxD: jax.Array, first: jax.Array | int) -> Tokens:
    """Inputs of a thought and what follows it, the first of which is number `first`, counting <start> as 0."""
    N = x_NxD.shape[0]
    positions_N = place.position + 1 + first + jnp.arange(N, dtype=jnp.int32)
    return Tokens(x_NxD.astype(thinker.decoder.config.dtype), positions_N, jnp.full(N, place.segment_id))

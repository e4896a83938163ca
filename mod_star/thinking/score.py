"""Scoring a thought: <start> thought <end> continuation in one differentiable pass against the text's keys/values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.model import Trace
from mod_star.model.layers import lookup
from mod_star.model.routing import RoutingCall, Tokens
from mod_star.model.transformer import apply_blocks
from mod_star.thinking.sample import Place, ThinkingDecoder, memory_before
from mod_star.thinking.thought import Thought, embed_tokens


@struct.dataclass
class Scored:
    """Hidden states (after the final norm, in the compute type) of one thought and what follows it."""

    thought_TxD: jax.Array
    """Each predicts the thought token of its index; the first is at <start>."""
    talk_NxD: jax.Array
    """Each predicts a token of the text after the thought; the first is at <end>. N is n_true."""
    trace: Trace | None
    """Routing of all t + 1 + n_true tokens, [groups, t + 1 + n_true]; None for a dense model."""


def score_thought(
    thinker: ThinkingDecoder, params: dict[str, Any], memory: Any, place: Place, thought: Thought, following: jax.Array
) -> Scored:
    """Runs [<start>; thought; <end>; following] after a place. Positions go on counting through all of it.

    Args:
      thinker: the model, and how it thinks; routed blocks repeat for the thought what they decided when it was sampled.
      params: with the entry "thinking".
      memory: as for `sample_thought`.
      place: that the thought comes after.
      thought: from `sample_thought`.
      following: int32, the next n_true - 1 tokens of the text (teacher forcing).

    Raises:
      InputError: a user's part of thinking is wrong.
    """
    decoder, thinking = thinker.decoder, thinker.thinking
    t, own = thinking.thought_length, params["thinking"]
    thought_TxD = embed_tokens(decoder.parts, thinking, params, thought.tokens_T, thought.extra_T)
    x_NxD = jnp.concatenate([own["start"][None], thought_TxD, own["end"][None], lookup(params["embedding"], following)])
    N = x_NxD.shape[0]
    decided = None
    if thought.decided_GxT is not None:
        decided = jnp.pad(thought.decided_GxT, ((0, 0), (0, N - t)), constant_values=-1)
    positions_N = place.position + 1 + jnp.arange(N, dtype=jnp.int32)
    tokens = Tokens(x_NxD.astype(decoder.config.dtype), positions_N, jnp.full(N, place.segment_id))
    call = RoutingCall(slots=thinker.thought_slots, decided=decided)
    output = apply_blocks(
        decoder, params, tokens, call, memory=memory_before(memory, place.position), keep_keys_values=False
    )
    return Scored(output.hidden[:t], output.hidden[t + 1 :], output.trace)

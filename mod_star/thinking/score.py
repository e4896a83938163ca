"""Scoring a thought: <start> thought <end> continuation in one differentiable pass against the text's keys/values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.config import ThinkingConfig
from mod_star.model import Decoder, Trace
from mod_star.model.layers import lookup
from mod_star.model.routing import RoutingCall, Tokens
from mod_star.model.transformer import apply_blocks
from mod_star.thinking.sample import Thought, embed_thought, text_before, thought_slots


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
    decoder: Decoder,
    params: dict[str, Any],
    text: Any,
    position: jax.Array,
    segment_id: jax.Array,
    thought: Thought,
    following: jax.Array,
    thinking: ThinkingConfig,
    slots: int | None = None,
) -> Scored:
    """Runs [<start>; thought; <end>; following] after `position`. Positions go on counting through all of it.

    Args:
      decoder: the model; routed blocks repeat for the thought what they decided when it was sampled.
      params: with the entry "thinking".
      text: as for `sample_thought`.
      position: int32 position in its document that the thought comes after.
      segment_id: int32 document.
      thought: from `sample_thought`.
      following: int32, the next n_true - 1 tokens of the text (teacher forcing).
      thinking: length of the thought.
      slots: as for `sample_thought`.
    """
    t, own = thinking.thought_length, params["thinking"]
    x_NxD = jnp.concatenate(
        [own["start"][None], embed_thought(params, thought.tokens_T), own["end"][None],
         lookup(params["embedding"], following)]
    )  # fmt: skip
    N = x_NxD.shape[0]
    slots = thought_slots(decoder.routing, thinking) if slots is None else slots
    decided = None
    if thought.decided_GxT is not None:
        decided = jnp.pad(thought.decided_GxT, ((0, 0), (0, N - t)), constant_values=-1)
    positions_N = position + 1 + jnp.arange(N, dtype=jnp.int32)
    tokens = Tokens(x_NxD.astype(decoder.config.dtype), positions_N, jnp.full(N, segment_id))
    call = RoutingCall(slots=slots, decided=decided)
    output = apply_blocks(decoder, params, tokens, call, memory=text_before(text, position), keep_keys_values=False)
    return Scored(output.hidden[:t], output.hidden[t + 1 :], output.trace)

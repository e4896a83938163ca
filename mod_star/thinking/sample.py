"""Sampling a thought: one function for one thought after one position. `vmap` it over positions, thoughts and batch.

A thought sees the text up to its position through the text's keys/values, which are computed once and shared by all
thoughts, and its own earlier tokens through a cache of its own. It cannot see another thought: nothing holds both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.config import RoutingConfig, ThinkingConfig, require_thinkable
from mod_star.errors import InputError, require
from mod_star.model import Decoder
from mod_star.model.attention import KeyValues
from mod_star.model.parts import LatentInput
from mod_star.model.routing import Tokens, causal_slots
from mod_star.model.transformer import logits_of
from mod_star.thinking.steps import empty_cache, thought_step
from mod_star.thinking.thought import (
    Thought,
    draw_step,
    embed_tokens,
    feed_back,
    latent_thought,
    log_prob_of,
    thought_input,
)


@dataclass(frozen=True)
class ThinkingDecoder:
    """A decoder with how it thinks; hashable, a static argument of compiled programs."""

    decoder: Decoder
    """Routed blocks decide causally."""
    thinking: ThinkingConfig
    """Length and kind of thoughts."""
    slots: int | None = None
    """Of a routed block for a thought and what follows it. None: `thought_slots` of `thinking`, which then must be
    what the model is trained with; needed where n_true is another."""

    @property
    def thought_slots(self) -> int:
        """`slots`, or what None stands for."""
        return thought_slots(self.decoder.routing, self.thinking) if self.slots is None else self.slots


@struct.dataclass
class Place:
    """Where a thought comes after."""

    position: jax.Array
    """int32 position in its document; <start> is at the next one."""
    segment_id: jax.Array
    """int32 document."""


def thought_slots(routing: RoutingConfig, thinking: ThinkingConfig) -> int:
    """Tokens that a routed block may compute of <start> thought <end> continuation: as of any text of that length.

    A model has one number, that of the `thinking` it is trained with. Where fewer or no tokens follow a thought, as in
    evaluation and generation, the slots stay those: else a thought would find fewer than it was trained with.
    """
    if routing.every == 0:
        return 0
    return causal_slots(routing, thinking.thought_length + 1 + thinking.n_true)


def memory_before(memory: Any, position: jax.Array) -> Any:
    """The view of shared keys/values that a thought after `position` has: what comes after it is not seen.

    Args:
      memory: any pytree of `KeyValues`.
      position: int32 scalar, the last position to see.
    """

    def view(key_values: KeyValues) -> KeyValues:
        return replace(key_values, until=jnp.broadcast_to(position, key_values.positions_M.shape[:-1]))

    return jax.tree.map(view, memory, is_leaf=lambda node: isinstance(node, KeyValues))


def sample_thought(
    thinker: ThinkingDecoder,
    params: dict[str, Any],
    memory: Any,
    place: Place,
    key: jax.Array,
    temperature: float,
    finish: bool = False,
) -> tuple[Thought, jax.Array | None]:
    """Samples the thought after one position, without gradients in mind.

    Args:
      thinker: the model, and how it thinks.
      params: with the entry "thinking"; groups stacked or unrolled, as for `mod_star.model.transformer.apply_blocks`.
      memory: keys/values of the text, {block name: tuple of KeyValues} stacked over groups, or a tuple of such.
      place: after which to think.
      key: of the draws.
      temperature: of the draws; 0: greedy.
      finish: run the last token and <end> too, and return the hidden state D that predicts the text after the thought.

    Returns:
      The thought, and the hidden state at <end> if asked for.

    Raises:
      InputError: the model can't think, or a user's part of thinking is wrong.
    """
    decoder, thinking = thinker.decoder, thinker.thinking
    position = place.position
    require_thinkable(decoder.routing)
    require(thinking.thought_length > 0, "thinking.thought_length", 0, "must be at least 1 to think")
    if "thinking" not in params:
        raise InputError("params: must have an entry 'thinking', see mod_star.training.state.initial_params")
    t, own = thinking.thought_length, params["thinking"]
    used = thought_input(decoder.parts, thinking)
    memory = memory_before(memory, position)

    def step(x_D: jax.Array, cache: Any, i: jax.Array) -> tuple[jax.Array, Any, Any]:
        """Runs one token, the i-th counting <start> as 0."""
        token = Tokens(x_D[None].astype(decoder.config.dtype), (position + 1 + i)[None], place.segment_id[None])
        output, cache = thought_step(decoder, params, memory, token, cache, thinker.thought_slots)
        decided = None if output.trace is None else output.trace.selected[:, 0].astype(jnp.int8)
        return output.hidden[0], cache, decided

    def think(carry: tuple[jax.Array, Any], i: jax.Array) -> tuple[tuple[jax.Array, Any], Any]:
        x_D, cache = carry
        hidden_D, cache, decided = step(x_D, cache, i)
        if isinstance(used, LatentInput):
            return (feed_back(used, params, hidden_D), cache), None
        logits_V = logits_of(params, hidden_D[None])[0]
        log_p = jax.nn.log_softmax(logits_V)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p)
        token, extra = draw_step(used, params, (hidden_D, logits_V, jax.random.fold_in(key, i)), temperature)
        x_D = embed_tokens(used, params, token[None], jax.tree.map(lambda leaf: leaf[None], extra))[0]
        return (x_D, cache), (token, log_prob_of(log_p, token), entropy, decided, extra)

    cache = empty_cache(memory, t + 2 if finish else t)
    # Before the first step these are the same for all thoughts, and after it not: `vmap` would trace the body again.
    alike = own["start"], cache["blocks"]
    start_D, blocks = jax.tree.map(lambda leaf: jnp.where(position >= 0, leaf, leaf), alike)
    first = (start_D, {**cache, "blocks": blocks})
    last, drawn = jax.lax.scan(think, first, jnp.arange(t, dtype=jnp.int32))
    if isinstance(used, LatentInput):
        thought = latent_thought(t)
    else:
        tokens_T, log_probs_T, entropies_T, decided_TxG, extra_T = drawn
        decided_GxT = None if decided_TxG is None else decided_TxG.T
        thought = Thought(tokens_T, log_probs_T, entropies_T, decided_GxT, extra_T)
    if not finish:
        return thought, None

    def close(carry: tuple[jax.Array, Any], i: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        x_D, cache = carry
        hidden_D, cache, _ = step(x_D, cache, i)
        return (own["end"], cache), hidden_D

    # The last token, then <end>: as a loop, so that the blocks are compiled once more and not twice.
    _, hidden_2xD = jax.lax.scan(close, last, jnp.arange(t, t + 2, dtype=jnp.int32))
    return thought, hidden_2xD[1]

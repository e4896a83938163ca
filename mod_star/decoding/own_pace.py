"""Rows that think before some of their tokens, each at its own pace: no row waits for the thoughts of another.

One pass runs one token of every row through all blocks: the next token of the text in one row, the third of a thought
in another. A thought's keys and values are written into the row's cache, right after the text's, where their positions
are. When it ends they are forgotten: the text's next token is written over its first.

Rows that think more often have their tokens later. When half of the rows have all of theirs, the passes go on with the
other half alone, and once more with a quarter. With `routing.decoded_rows` fixed, tokens of thoughts may pass by as
those of the text do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct

from mod_star import random_streams
from mod_star.config import ThinkingConfig
from mod_star.decoding.caches import close_caches, open_caches
from mod_star.decoding.choosing import Bounds, Chosen, choose
from mod_star.decoding.sampling import Sampling
from mod_star.decoding.state import DecodeState, put_prompts, take_prompts
from mod_star.decoding.step import NewTokens, decode_step
from mod_star.decoding.think import Think, ThoughtRecord, to_think
from mod_star.model import Decoder
from mod_star.model.layers import lookup
from mod_star.model.parts import LatentInput
from mod_star.model.transformer import UnstackedParams, logits_of
from mod_star.thinking.mixing import thought_weight
from mod_star.thinking.sample import thought_slots
from mod_star.thinking.thought import draw_step, embed_tokens, feed_back, thought_input


@struct.dataclass
class Pace:
    """Rows that stand at different tokens; B rows."""

    state: DecodeState
    """Its `step` is that of the beginning."""
    steps_B: jax.Array
    """int32 tokens of text that each row has generated."""
    phase_B: jax.Array
    """int32 tokens of an open thought that have run, <start> and <end> included; 0: no thought is open."""
    base_BxD: jax.Array
    """Hidden state without the open thought, in the compute type."""
    base_logits_BxV: jax.Array
    """float32 logits of that."""


@struct.dataclass
class Turn:
    """What each row does in a pass; each bool B."""

    active_B: jax.Array
    """It is neither finished nor has it as many tokens as are asked for."""
    thinks_B: jax.Array
    """It opens a thought."""
    emits_B: jax.Array
    """It has its next token of text."""
    closes_B: jax.Array
    """It has it after a thought."""


def advance_at_own_pace(
    decoder: Decoder,
    thinking: ThinkingConfig,
    params: UnstackedParams,
    state: DecodeState,
    bounds: Bounds,
    sampling: Sampling,
    think: Think,
) -> DecodeState:
    """Generates until `bounds.until` tokens per row exist, or as many as there may be, or every row is finished.

    What a row generates is what it would generate alone; a row that has all its tokens waits for the
    others.

    Args:
      decoder: the model.
      thinking: length and kind of thoughts.
      params: with the entry "thinking", groups unrolled.
      state: of a batch.
      bounds: everything that is data.
      sampling: how to draw; its numbers are in `bounds`.
      think: auto; its threshold is in `bounds`.

    Raises:
      InputError: the model has no decider, and is to think by it; or a user's part of thinking is wrong.
    """
    until = jnp.minimum(bounds.until, state.limit)
    B, V = state.hidden_BxD.shape[0], decoder.config.vocab_size
    none_B = jnp.zeros(B, jnp.int32)
    room = (thinking.thought_length + 2, thought_slots(decoder.routing, thinking))
    state = replace(state, caches=open_caches(state.caches, *room))
    pace = Pace(state, none_B + state.step, none_B, state.hidden_BxD, jnp.zeros((B, V), jnp.float32))

    def active(pace: Pace) -> jax.Array:
        return ~pace.state.done_B & (pace.steps_B < until)

    def one_pass(pace: Pace) -> Pace:
        return _one_pass(decoder, thinking, params, pace, active(pace), bounds, (sampling, think))

    # On a mesh rows stay on their devices, and branches with their prompt.
    alone = state.branches == 1 and jax.sharding.get_abstract_mesh().empty
    pace = _until_all_have_theirs(one_pass, active, pace, sorted({-(-B // 2), -(-B // 4)} - {B}) if alone else [])
    return replace(pace.state, step=jnp.max(pace.steps_B), caches=close_caches(pace.state.caches, *room))


def _until_all_have_theirs(
    one_pass: Callable[[Pace], Pace], active: Callable[[Pace], jax.Array], pace: Pace, sizes: list[int]
) -> Pace:
    """Passes until no row is active; when as few are as the largest of `sizes` (ascending), with these alone."""
    few = sizes[-1] if sizes else 0
    pace = jax.lax.while_loop(lambda pace: jnp.sum(active(pace)) > few, one_pass, pace)
    if not few:
        return pace
    rows = jnp.argsort(~active(pace))[:few].astype(jnp.int32)  # the active ones, then others to fill up
    taken = Pace(take_prompts(pace.state, rows), *(leaf[rows] for leaf in _own_arrays(pace)))
    taken = _until_all_have_theirs(one_pass, active, taken, sizes[:-1])

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows].set(new, unique_indices=True)

    return Pace(put_prompts(pace.state, taken.state, put), *map(put, _own_arrays(pace), _own_arrays(taken)))


def _own_arrays(pace: Pace) -> tuple[jax.Array, ...]:
    return pace.steps_B, pace.phase_B, pace.base_BxD, pace.base_logits_BxV


def _one_pass(
    decoder: Decoder,
    thinking: ThinkingConfig,
    params: UnstackedParams,
    pace: Pace,
    active_B: jax.Array,
    bounds: Bounds,
    how: tuple[Sampling, Think],
) -> Pace:
    """One token of every active row through the blocks."""
    sampling, think = how
    state, hidden_BxD = pace.state, pace.state.hidden_BxD
    logits_BxV = logits_of(params, hidden_BxD)
    turn, logits_BxV, record = _turn(decoder, thinking, params, pace, active_B, (logits_BxV, bounds.threshold, think))
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, pace.steps_B)
    chosen = choose(
        logits_BxV, keys_B, pace.steps_B == 0, sampling, bounds, state.branches, state.confidence is not None
    )
    thought_B, x_BxD = _next_of_thought(decoder, thinking, params, pace, logits_BxV, think.temperature)
    in_thought_B = active_B & ~turn.emits_B
    if thought_B is not None:
        drawn_B = in_thought_B & (pace.phase_B >= 1) & (pace.phase_B <= thinking.thought_length)
        record = replace(record, thoughts_BxTxN=_put_token(record.thoughts_BxTxN, thought_B, pace, drawn_B))
    own = params["thinking"]
    x_BxD = jnp.where(turn.thinks_B[:, None], own["start"], x_BxD)
    x_BxD = jnp.where((pace.phase_B == thinking.thought_length + 1)[:, None], own["end"], x_BxD)
    x_BxD = jnp.where(turn.emits_B[:, None], lookup(params["embedding"], chosen.tokens_B), x_BxD)
    ends_B = turn.emits_B & chosen.ends_B
    new = NewTokens(
        chosen.tokens_B,
        state.lengths_B,
        pace.steps_B + jnp.where(turn.emits_B, 0, pace.phase_B),
        active_B & ~ends_B,
        inputs_BxD=x_BxD,
        thought_B=in_thought_B,
        thought_slots=thought_slots(decoder.routing, thinking),
    )
    new_BxD, caches = decode_step(decoder, params, state.caches, new, state.branches)
    opens_Bx1 = turn.thinks_B[:, None]
    return Pace(
        replace(
            _with_chosen(state, chosen, pace.steps_B, turn.emits_B),
            caches=caches,
            hidden_BxD=jnp.where(active_B[:, None], new_BxD, hidden_BxD),
            done_B=state.done_B | ends_B,
            record=record,
        ),
        pace.steps_B + turn.emits_B,
        jnp.where(in_thought_B, pace.phase_B + 1, 0),
        jnp.where(opens_Bx1, hidden_BxD, pace.base_BxD),
        jnp.where(opens_Bx1, logits_BxV, pace.base_logits_BxV),
    )


def _turn(
    decoder: Decoder,
    thinking: ThinkingConfig,
    params: UnstackedParams,
    pace: Pace,
    active_B: jax.Array,
    asked: tuple[jax.Array, jax.Array | float, Think],
) -> tuple[Turn, jax.Array, ThoughtRecord]:
    """What each row does, its logits (mixed where a thought ends), and the record with what is decided.

    `asked`: logits of the hidden states, threshold, and when to think.
    """
    logits_BxV, threshold, think = asked
    state, hidden_BxD = pace.state, pace.state.hidden_BxD
    assert state.record is not None
    text_B = active_B & (pace.phase_B == 0)
    wants_B, entropies_B = to_think(params, think, threshold, hidden_BxD, logits_BxV)
    thinks_B = text_B & wants_B
    closes_B = active_B & (pace.phase_B == thinking.thought_length + 2)
    weights_B = thought_weight(decoder.parts, thinking, params, pace.base_BxD, hidden_BxD)
    mixed_BxV = pace.base_logits_BxV + weights_B[:, None] * (logits_BxV - pace.base_logits_BxV)
    put, steps_B = _put, pace.steps_B
    record = replace(
        state.record,
        entropies_BxT=put(state.record.entropies_BxT, entropies_B, steps_B, text_B),
        may_think_BxT=put(state.record.may_think_BxT, text_B, steps_B, text_B),
        thinks_BxT=put(state.record.thinks_BxT, thinks_B, steps_B, text_B),
        weights_BxT=put(state.record.weights_BxT, weights_B, steps_B, closes_B),
    )
    turn = Turn(active_B, thinks_B, (text_B & ~thinks_B) | closes_B, closes_B)
    return turn, jnp.where(closes_B[:, None], mixed_BxV, logits_BxV), record


def _next_of_thought(
    decoder: Decoder,
    thinking: ThinkingConfig,
    params: UnstackedParams,
    pace: Pace,
    logits_BxV: jax.Array,
    temperature: float,
) -> tuple[jax.Array | None, jax.Array]:
    """The next tokens of open thoughts, int32 B (None: latent ones have none), and their embeddings, float32 BxD."""
    used, state = thought_input(decoder.parts, thinking), pace.state
    if isinstance(used, LatentInput):
        return None, jax.vmap(lambda hidden_D: feed_back(used, params, hidden_D))(state.hidden_BxD)

    def one(row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden_D, logits_V, key, step, phase = row
        key = jax.random.fold_in(jax.random.fold_in(key, random_streams.THOUGHTS), step)
        token, extra = draw_step(used, params, (hidden_D, logits_V, jax.random.fold_in(key, phase - 1)), temperature)
        extra = jax.tree.map(lambda leaf: leaf[None], extra)
        return token, embed_tokens(used, params, token[None], extra)[0]

    return jax.vmap(one)((state.hidden_BxD, logits_BxV, state.keys_B, pace.steps_B, pace.phase_B))


def _with_chosen(state: DecodeState, chosen: Chosen, steps_B: jax.Array, emits_B: jax.Array) -> DecodeState:
    """The state with the tokens that some rows have chosen, each in its own column."""
    put = functools.partial(_put, steps_B=steps_B, where_B=emits_B)
    confidence = state.confidence
    if confidence is not None:
        confidence = jax.tree.map(put, confidence, chosen.confidence)
    return replace(
        state,
        tokens_BxT=put(state.tokens_BxT, chosen.tokens_B),
        log_probs_BxT=put(state.log_probs_BxT, chosen.log_probs_B),
        gaps_BxT=put(state.gaps_BxT, chosen.gaps_B),
        confidence=confidence,
    )


def _put(buffer_BxT: jax.Array, values_B: jax.Array, steps_B: jax.Array, where_B: jax.Array) -> jax.Array:
    """The buffer with a value in each row's column, in some of the rows."""
    rows_B = jnp.arange(steps_B.shape[0], dtype=jnp.int32)
    columns_B = jnp.where(where_B, steps_B, buffer_BxT.shape[1])  # beyond the last one nothing is written
    return buffer_BxT.at[rows_B, columns_B].set(values_B.astype(buffer_BxT.dtype), mode="drop")


def _put_token(thoughts_BxTxN: jax.Array, tokens_B: jax.Array, pace: Pace, where_B: jax.Array) -> jax.Array:
    """The thoughts with the next token of some."""
    B, T, N = thoughts_BxTxN.shape
    places_B = pace.steps_B * N + pace.phase_B - 1
    return _put(thoughts_BxTxN.reshape(B, T * N), tokens_B, places_B, where_B).reshape(B, T, N)

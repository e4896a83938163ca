"""Thinking while generating: one thought after the last token, in the rows that need it, then forgotten.

Here rows are in step. Those of a batch that thinks only before some tokens are not, see `mod_star.decoding.own_pace`.

A thought reads the decoding caches and keeps keys/values of its own; those caches never hold any of it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.config import ThinkingConfig
from mod_star.decoding.caches import join_memory, over_rows
from mod_star.errors import require
from mod_star.model import Decoder
from mod_star.model.rows import compute_if
from mod_star.model.transformer import UnstackedParams, logits_of
from mod_star.thinking.decider import decider_of, expected_gain
from mod_star.thinking.mixing import mixed_logits, thought_weight
from mod_star.thinking.sample import Place, ThinkingDecoder, sample_thought

WHEN = ("never", "always", "auto")
By = Literal["entropy", "decider"]
BY: tuple[By, ...] = get_args(By)


@dataclass(frozen=True)
class Think:
    """When to think before the next token, and how."""

    when: Literal["never", "always", "auto"] = "never"
    """auto: where what `by` names is above `threshold`."""
    threshold: float | None = None
    """In nats; for auto only, which needs it. May be infinite."""
    share: float = 0.25
    """About how many of the rows auto lets think, in (0, 1]. Where rows are in step, as of beams and of texts that are
    scored, it sizes the chunks they are computed in; it never changes the result."""
    temperature: float = 0.0
    """Of the draws of thought tokens; 0: greedy. At least 1e-6 otherwise."""
    by: By = "entropy"
    """What auto decides by. entropy: that of the prediction without a thought. decider: the gain that the model's
    decider expects of a thought, see `mod_star.thinking.decider`."""

    def __post_init__(self) -> None:
        require(self.when in WHEN, "think.when", self.when, f"must be one of {', '.join(WHEN)}")
        require(self.by in BY, "think.by", self.by, f"must be one of {', '.join(BY)}")
        if self.when == "auto":
            has_threshold = self.threshold is not None and not math.isnan(self.threshold)
            require(has_threshold, "think.threshold", self.threshold, "must be a number with think.when = 'auto'")
        require(0 < self.share <= 1, "think.share", self.share, "must lie in (0, 1]")
        allowed = self.temperature == 0 or (self.temperature >= 1e-6 and math.isfinite(self.temperature))
        require(allowed, "think.temperature", self.temperature, "must be 0 (greedy) or at least 1e-6")


NEVER = Think()


@struct.dataclass
class ThoughtRecord:
    """What was thought before each token; as a whole [B, T, ...], or one step's with T left out."""

    entropies_BxT: jax.Array
    """float32 entropy of the prediction without a thought, in nats; 0 where the row was not to think."""
    may_think_BxT: jax.Array
    """bool; whether the row might think here: it was not finished, and `Think` was not `never`."""
    thinks_BxT: jax.Array
    """bool; whether the row thought."""
    thoughts_BxTxN: jax.Array
    """int32 tokens of the thought; -1 where there are none, and for pauses."""
    weights_BxT: jax.Array
    """float32 mixing weight of the thought's prediction; 0 where the row did not think."""


def empty_record(rows: int, new_tokens: int, thinking: ThinkingConfig) -> ThoughtRecord:
    """The record before the first token."""
    none, nowhere = jnp.zeros((rows, new_tokens), jnp.float32), jnp.zeros((rows, new_tokens), bool)
    thoughts = jnp.full((rows, new_tokens, thinking.thought_length), -1, jnp.int32)
    return ThoughtRecord(none, nowhere, nowhere, thoughts, none)


@struct.dataclass
class LastTokens:
    """The last token of every row of a batch, after which there may be a thought."""

    hidden_BxD: jax.Array
    """Hidden state at it, after the final norm."""
    memory: tuple[Any, Any]
    """Keys/values up to it, from `caches.cached_memory`."""
    positions_B: jax.Array
    """int32 position of it."""
    keys_B: jax.Array
    """Random keys of the thoughts' draws."""
    active_B: jax.Array
    """bool; finished rows never think."""


def think_step(
    decoder: Decoder,
    params: UnstackedParams,
    thinking: ThinkingConfig,
    think: Think,
    threshold: jax.Array | float,
    last: LastTokens,
    branches: int = 1,
) -> tuple[jax.Array, ThoughtRecord]:
    """Predicts the next token of every row, after a thought where one is due.

    always computes the thoughts of all rows, those of finished rows too; auto those of the rows that think alone, and
    at batch 1 nothing at all if the row doesn't.

    Args:
      decoder: the model.
      params: with the entry "thinking", groups unrolled.
      thinking: length and kind of thoughts.
      think: always or auto.
      threshold: float32 scalar, in place of `think.threshold`: one program for all thresholds.
      last: the rows as they are before the next token.
      branches: rows per prompt, see `caches.over_rows`.

    Returns:
      Float32 logits BxV, those of the plain prediction where a row doesn't think; and the step's record.

    Raises:
      InputError: the model has no decider, and is to think by it.
    """
    base_BxV = logits_of(params, last.hidden_BxD)
    wants_B, entropies_B = to_think(params, think, threshold, last.hidden_BxD, base_BxV)
    thinks_B = last.active_B & wants_B
    after_thought = functools.partial(_after_thought, decoder, thinking, think.temperature)

    def row(row: tuple[Any, ...], shared: Any) -> tuple[jax.Array, ...]:
        thinks, hidden_D, own, position, key = row
        arrays = (params, hidden_D, join_memory(own, shared), position, key)
        result: tuple[jax.Array, ...] = (
            after_thought(*arrays) if think.when == "always" else compute_if(thinks, after_thought, arrays, think.share)
        )
        return result

    own, shared = last.memory
    logits_BxV, thoughts_BxN, weights_B = over_rows(
        row, (thinks_B, last.hidden_BxD, own, last.positions_B, last.keys_B), shared, branches
    )
    record = ThoughtRecord(
        jnp.where(last.active_B, entropies_B, 0.0),
        last.active_B,
        thinks_B,
        jnp.where(thinks_B[:, None], thoughts_BxN, -1),
        jnp.where(thinks_B, weights_B, 0.0),
    )
    return jnp.where(thinks_B[:, None], logits_BxV, base_BxV), record


def to_think(
    params: UnstackedParams, think: Think, threshold: jax.Array | float, hidden_BxD: jax.Array, logits_BxV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether each row is to think before its next token, bool B; and the entropy of its prediction, float32 B in nats.

    Args:
      params: the model's.
      think: always or auto.
      threshold: float32 scalar, in place of `think.threshold`.
      hidden_BxD: hidden states without a thought, after the final norm.
      logits_BxV: of these, float32.

    Raises:
      InputError: the model has no decider, and is to think by it.
    """
    log_p_BxV = jax.nn.log_softmax(logits_BxV)
    entropies_B = -jnp.sum(jnp.exp(log_p_BxV) * log_p_BxV, -1)
    if think.when == "always":
        return jnp.ones_like(entropies_B, bool), entropies_B
    scores_B = expected_gain(decider_of(params), hidden_BxD) if think.by == "decider" else entropies_B
    return scores_B > threshold, entropies_B


def _after_thought(
    decoder: Decoder,
    thinking: ThinkingConfig,
    temperature: float,
    params: UnstackedParams,
    hidden_D: jax.Array,
    memory: Any,
    position: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits V mixed after a thought, the thought N, and the mixing weight."""
    thinker, place = ThinkingDecoder(decoder, thinking), Place(position, jnp.int32(1))
    thought, after_D = sample_thought(thinker, params, memory, place, key, temperature, finish=True)
    assert after_D is not None
    weight_1 = thought_weight(decoder.parts, thinking, params, hidden_D[None], after_D[None])
    logits_1xV = mixed_logits(params, hidden_D[None], after_D[None], weight_1)
    return logits_1xV[0], thought.tokens_T, weight_1[0]

"""Which token comes next in each row, by how tokens are drawn: for rows in step, and for rows at their own pace."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.decoding.confidence import TokenConfidence, token_confidence
from mod_star.decoding.sampling import Sampling, draw, log_prob_and_gap, ranked_tokens

Data = Any
"""An array, of NumPy outside of programs and of JAX inside."""


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


@struct.dataclass
class Chosen:
    """The next token of each row, with what is recorded of it."""

    tokens_B: jax.Array
    """int32."""
    log_probs_B: jax.Array
    """float32, in nats, at temperature 1."""
    gaps_B: jax.Array
    """float32, as `DecodeState.gaps_BxT`."""
    ends_B: jax.Array
    """bool; it is an end token."""
    confidence: TokenConfidence | None
    """Of the distribution; None where it is not asked for."""


def choose(
    logits_BxV: jax.Array,
    keys_B: jax.Array,
    first: jax.Array,
    sampling: Sampling,
    bounds: Bounds,
    branches: int,
    confidence: bool,
) -> Chosen:
    """Chooses the next token of every row from its logits.

    Args:
      logits_BxV: float32.
      keys_B: a random key per row, of this token.
      first: bool, whether it is the row's first new token: a scalar, or one per row.
      sampling: how to draw; its numbers are in `bounds`.
      bounds: everything that is data.
      branches: rows per prompt.
      confidence: whether to measure the confidence.
    """
    numbers = (bounds.temperature, bounds.top_p, bounds.min_p)
    tokens_B = jax.vmap(functools.partial(draw, sampling=sampling, numbers=numbers))(keys_B, logits_BxV)
    if sampling.branch:

        def ranked() -> jax.Array:
            return jnp.where(first, ranked_tokens(logits_BxV, branches), tokens_B)

        tokens_B = jax.lax.cond(jnp.any(first), ranked, lambda: tokens_B)
    log_probs_B, gaps_B = log_prob_and_gap(logits_BxV, tokens_B)
    ends_B = jnp.any(tokens_B[:, None] == bounds.ends_E, -1)
    return Chosen(tokens_B, log_probs_B, gaps_B, ends_B, token_confidence(logits_BxV) if confidence else None)

"""Which positions think in training: scores of positions, of which the highest are taken.

See `mod_star.Parts.where_to_think` for a score of one's own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mod_star.config import ThinkingConfig
from mod_star.model.cross_entropy import token_entropy
from mod_star.model.parts import Parts, require_array

Batch = dict[str, jax.Array]


def by_chance(batch: Batch, hidden_BxCxD: jax.Array, head_VxD: jax.Array, key: jax.Array, chunk: int) -> jax.Array:
    """Uniform random scores BxC, float32."""
    del batch, head_VxD, chunk
    return jax.random.uniform(key, hidden_BxCxD.shape[:2], jnp.float32)


def by_entropy(batch: Batch, hidden_BxCxD: jax.Array, head_VxD: jax.Array, key: jax.Array, chunk: int) -> jax.Array:
    """Entropy of the prediction without a thought, float32 BxC, in nats."""
    del batch, key
    return token_entropy(hidden_BxCxD, head_VxD, chunk)


SCORES = {"random": by_chance, "entropy": by_entropy}
"""By `thinking.think_where`."""


def position_scores(
    parts: Parts, thinking: ThinkingConfig, batch: Batch, hidden_BxCxD: jax.Array, head_VxD: jax.Array, key: jax.Array,
    chunk: int,
) -> jax.Array:  # fmt: skip
    """Scores BxC, by what is in force, of the first C positions of each sequence, without gradient.

    Args:
      parts: the model's.
      thinking: names the built-in scores.
      batch: arrays BxS.
      hidden_BxCxD: hidden states without thoughts.
      head_VxD: float32 LM head.
      key: of random scores.
      chunk: positions per sequence whose logits exist at one time.

    Raises:
      InputError: a user's function gives another shape or type.
    """
    C = hidden_BxCxD.shape[1]
    score = parts.where_to_think or SCORES[thinking.think_where]
    hidden_BxCxD, head_VxD = jax.lax.stop_gradient((hidden_BxCxD, head_VxD))
    scores_BxC = score({name: values[:, :C] for name, values in batch.items()}, hidden_BxCxD, head_VxD, key, chunk)
    return jax.lax.stop_gradient(require_array("where_to_think", scores_BxC, hidden_BxCxD.shape[:2]))

"""What a model needs beyond a plain decoder's parameters to think: <start>, <end> and the mixing head.

They are an entry of their own beside the decoder's, params["thinking"] = {"start": D, "end": D, "mixing": {...}}.
<start> and <end> are embeddings, not ids: they cannot be sampled, neither as text nor as thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig
from mod_star.model.layers import Params, fan_in_normal


def thinking_init(
    key: jax.Array, config: ModelConfig, embedding_VxD: jax.Array, start_ids: Sequence[int], end_ids: Sequence[int]
) -> dict[str, Any]:
    """Float32 parameters of thinking.

    Args:
      key: for the mixing head.
      config: sizes.
      embedding_VxD: the decoder's embedding.
      start_ids: tokens whose mean embedding <start> begins as (the paper: those of "---").
      end_ids: the same for <end>.
    """
    mean = lambda ids: jnp.mean(embedding_VxD[jnp.asarray(ids, jnp.int32)], 0)  # noqa: E731
    return {"start": mean(start_ids), "end": mean(end_ids), "mixing": mixing_init(key, config)}


def mixing_init(key: jax.Array, config: ModelConfig) -> Params:
    """Parameters of `mixing_weight`: two hidden layers and an output of zeros."""
    D = config.width
    first, second = jax.random.split(key)
    return {
        "first": fan_in_normal(first, (2 * D, D), 2 * D),
        "first_bias": jnp.zeros(D, jnp.float32),
        "second": fan_in_normal(second, (D, D), D),
        "second_bias": jnp.zeros(D, jnp.float32),
        "output": jnp.zeros(D, jnp.float32),
        "output_bias": jnp.zeros((), jnp.float32),
    }

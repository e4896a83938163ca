"""What a model needs beyond a plain decoder's parameters to think: <start>, <end> and the mixing head.

They are an entry of their own beside the decoder's, params["thinking"] = {"start": D, "end": D, "mixing": {...}}, also
"decider" where there is one, and "thought" where a user's `ThoughtInput` or `LatentInput` has parameters.
<start> and <end> are embeddings, not ids: they cannot be sampled, neither as text nor as thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mod_star import random_streams
from mod_star.config import ModelConfig, ThinkingConfig
from mod_star.model.parts import DEFAULT_PARTS, Parts
from mod_star.thinking.decider import decider_init
from mod_star.thinking.mixing import mixing_of

_DEFAULTS = ThinkingConfig()


def thinking_init(
    key: jax.Array,
    config: ModelConfig,
    embedding_VxD: jax.Array,
    start_ids: Sequence[int],
    end_ids: Sequence[int],
    parts: Parts = DEFAULT_PARTS,
    thinking: ThinkingConfig = _DEFAULTS,
) -> dict[str, Any]:
    """Float32 parameters of thinking.

    Args:
      key: for the mixing head, and parameters of a thought's input.
      config: sizes.
      embedding_VxD: the decoder's embedding.
      start_ids: tokens whose mean embedding <start> begins as (the paper: those of "---").
      end_ids: the same for <end>.
      parts: the model's; its `mixing` and `thought` may have parameters of their own.
      thinking: how it thinks; its `mixing` decides whether there is a head, its `decider_width` whether a decider.
    """
    mean = lambda ids: jnp.mean(embedding_VxD[jnp.asarray(ids, jnp.int32)], 0)  # noqa: E731
    mixing = mixing_of(parts, thinking).init(key, config)
    params = {"start": mean(start_ids), "end": mean(end_ids), "mixing": mixing}
    if thinking.decider_width:
        params["decider"] = new_decider(key, config, thinking.decider_width)
    if parts.thought is not None and parts.thought.init is not None:
        params["thought"] = parts.thought.init(jax.random.fold_in(key, random_streams.THOUGHT_PARAMETERS), config)
    return params


def new_decider(key: jax.Array, config: ModelConfig, width: int) -> dict[str, Any]:
    """Parameters of a decider; `key` is that of all of thinking's parameters."""
    return decider_init(jax.random.fold_in(key, random_streams.DECIDER), config, width)

"""What changes while decoding: one pytree for a batch of Q prompts with the same number of branches each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import struct

from mod_star.decoding.caches import Cache, put_rows_of_cache, reorder_cache, take_prompts_of_cache
from mod_star.decoding.confidence import TokenConfidence
from mod_star.decoding.think import ThoughtRecord


@struct.dataclass
class DecodeState:
    """Everything that changes while decoding a batch of B rows with room for T new tokens.

    Row q * branches + i is branch i of prompt q. T and B may be more than was asked for: see `limit` and `count`.
    """

    caches: tuple[Cache, ...]
    """One per block, in order."""
    hidden_BxD: jax.Array
    """Hidden state at the last token, after the final norm, in the compute type: times the LM head it gives logits."""
    tokens_BxT: jax.Array
    """int32 generated tokens; -1 where none (yet)."""
    log_probs_BxT: jax.Array
    """float32 log-probability of each generated token under the model itself (temperature 1, all tokens; after its
    thought, where the row thought)."""
    gaps_BxT: jax.Array
    """float32 probability of the best token less that of the second best, in the same distribution."""
    step: jax.Array
    """int32 number of tokens generated in each unfinished row."""
    limit: jax.Array
    """int32 most tokens to generate in each row, at most T."""
    count: jax.Array
    """int32 prompts that count; the ones after them fill up the batch and are finished from the start."""
    done_B: jax.Array
    """bool; the row has generated an end token, or `stream` was told to end it."""
    lengths_B: jax.Array
    """int32 prompt lengths."""
    keys_B: jax.Array
    """A random key per row: what a row draws does not depend on the rows beside it."""
    confidence: TokenConfidence | None = None
    """How sure the model was of each token; None: not asked for, and not computed."""
    record: ThoughtRecord | None = None
    """What was thought before each token; None for a model that can't think."""
    branches: int = struct.field(pytree_node=False, default=1)
    """Rows per prompt, which share its keys/values."""


def reorder(state: DecodeState, rows_B: jax.Array) -> DecodeState:
    """Row b becomes a copy of row rows_B[b], as beam search wants it.

    Args:
      state: of a batch.
      rows_B: int32; must stay within the branches of the same prompt. Only what is the rows' own is copied.
    """
    return _take_rows(state, tuple(reorder_cache(cache, rows_B) for cache in state.caches), rows_B)


@jax.jit
def take_prompts(state: DecodeState, prompts: jax.Array | npt.NDArray[np.int32]) -> DecodeState:
    """The state of some of the prompts, in the order given; all their branches come along."""
    k = state.branches
    prompts = jnp.asarray(prompts, jnp.int32)
    rows = (prompts[:, None] * k + jnp.arange(k, dtype=jnp.int32)).reshape(-1)
    caches = tuple(take_prompts_of_cache(cache, prompts, rows) for cache in state.caches)
    return replace(_take_rows(state, caches, rows), count=jnp.int32(prompts.shape[0]))


def put_prompts(
    state: DecodeState, taken: DecodeState, put: Callable[[jax.Array, jax.Array], jax.Array]
) -> DecodeState:
    """The state with what has become of the prompts that `take_prompts` took, which have one branch each.

    Args:
      state: what they were taken from.
      taken: they themselves, later.
      put: writes rows of an array into those of another that they were taken from.
    """
    fixed: dict[str, Any] = {"caches": (), **dict.fromkeys(("step", "limit", "count", "lengths_B", "keys_B"))}
    by_row = jax.tree.map(put, replace(state, **fixed), replace(taken, **fixed))
    caches = tuple(put_rows_of_cache(old, new, put) for old, new in zip(state.caches, taken.caches, strict=True))
    kept = {name: getattr(state, name) for name in fixed if name != "caches"}
    whole: DecodeState = replace(by_row, caches=caches, **kept)
    return whole


def _take_rows(state: DecodeState, caches: tuple[Cache, ...], rows: jax.Array) -> DecodeState:
    by_row = replace(state, caches=(), step=None, limit=None, count=None)  # type: ignore[arg-type]
    taken = jax.tree.map(lambda leaf: leaf[rows], by_row)
    return replace(taken, caches=caches, step=state.step, limit=state.limit, count=state.count)

"""Keys and values kept while decoding, per block: all tokens for a full block, the computed ones for a routed block.

Layout: the prompt's keys/values and the generated tokens' are segments of their own. All rows of a batch write a
generated token's to the same slot (the step), so a full block's cache is updated in place by one slice; what differs
between rows, the prompt's length, is data in the masks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.config import RoutingConfig
from mod_star.model.attention import Segment
from mod_star.model.transformer import block_names


@struct.dataclass
class FullCache:
    """Keys/values of a full block for a batch of B rows, P prompt slots and T slots for generated tokens."""

    prompt_keys_BxKxPxE: jax.Array
    prompt_values_BxKxPxE: jax.Array
    keys_BxKxTxE: jax.Array
    values_BxKxTxE: jax.Array

    def segments(self, lengths_B: jax.Array, step: jax.Array) -> tuple[Segment, Segment]:
        """The two segments that the token of `step` attends to besides itself; leaves have a leading batch axis."""
        B, _, P, _ = self.prompt_keys_BxKxPxE.shape
        T = self.keys_BxKxTxE.shape[2]
        prompt_slots, slots = jnp.arange(P, dtype=jnp.int32), jnp.arange(T, dtype=jnp.int32)
        prompt = Segment(
            self.prompt_keys_BxKxPxE,
            self.prompt_values_BxKxPxE,
            jnp.broadcast_to(prompt_slots, (B, P)),
            jnp.ones((B, P), jnp.int32),
            prompt_slots < lengths_B[:, None],
        )
        generated = Segment(
            self.keys_BxKxTxE,
            self.values_BxKxTxE,
            lengths_B[:, None] + slots,
            jnp.ones((B, T), jnp.int32),
            jnp.broadcast_to(slots < step, (B, T)),
        )
        return prompt, generated

    def append(self, own: Segment, step: jax.Array) -> FullCache:
        """With the keys/values of one token per row (B x K x 1 x E) in slot `step`."""
        write = lambda cache, new: jax.lax.dynamic_update_slice_in_dim(cache, new, step, 2)  # noqa: E731
        return replace(
            self,
            keys_BxKxTxE=write(self.keys_BxKxTxE, own.keys_KxMxE),
            values_BxKxTxE=write(self.values_BxKxTxE, own.values_KxMxE),
        )


@struct.dataclass
class RoutedCache:
    """Keys/values of the tokens that a routed block computed, in M slots and one more that is never read.

    The spare slot takes the writes of rows that have nothing to write, which keeps the update free of branches.
    """

    keys_BxKxMxE: jax.Array
    values_BxKxMxE: jax.Array
    positions_BxM: jax.Array
    """int32 positions of the cached tokens."""
    count_B: jax.Array
    """int32 slots filled."""
    overflow_B: jax.Array
    """int32 tokens that the causal rule wanted to compute but that passed by because no slot was left."""

    @property
    def slots(self) -> int:
        """M, the number of tokens that fit."""
        return self.positions_BxM.shape[1] - 1

    def segment(self) -> Segment:
        """What a token attends to besides itself; leaves have a leading batch axis."""
        valid = jnp.arange(self.slots + 1) < self.count_B[:, None]
        return Segment(
            self.keys_BxKxMxE, self.values_BxKxMxE, self.positions_BxM, jnp.ones_like(self.positions_BxM), valid
        )

    def append(self, own: Segment, computed_B: jax.Array, overflow_B: jax.Array) -> RoutedCache:
        """With the keys/values of one token in each row that computed it, and overflows counted."""
        rows = jnp.arange(computed_B.shape[0])
        slot_B = jnp.where(computed_B, self.count_B, self.slots)
        if computed_B.shape[0] == 1:  # a slice is updated in place for certain, and fast
            write = lambda cache, new: jax.lax.dynamic_update_slice_in_dim(cache, new, slot_B[0], 2)  # noqa: E731
        else:
            write = lambda cache, new: cache.at[rows, :, slot_B].set(new[:, :, 0], unique_indices=True)  # noqa: E731
        return RoutedCache(
            write(self.keys_BxKxMxE, own.keys_KxMxE),
            write(self.values_BxKxMxE, own.values_KxMxE),
            self.positions_BxM.at[rows, slot_B].set(own.positions_M[:, 0]),
            self.count_B + computed_B,
            self.overflow_B + overflow_B,
        )


Cache = FullCache | RoutedCache


def full_cache(prompt: Segment, new_tokens: int) -> FullCache:
    """Cache of a full block after prefill; `prompt` has leaves with a leading batch axis."""
    B, K, _, E = prompt.keys_KxMxE.shape
    empty = jnp.zeros((B, K, new_tokens, E), prompt.keys_KxMxE.dtype)
    return FullCache(prompt.keys_KxMxE, prompt.values_KxMxE, empty, empty)


def routed_cache(prompt: Segment, overflow_B: jax.Array, slots: int) -> RoutedCache:
    """Cache of a routed block after prefill: the computed tokens of the prompt come first, then free slots."""
    spare = slots + 1 - prompt.positions_M.shape[1]
    pad = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, spare), (0, 0)))  # noqa: E731
    return RoutedCache(
        pad(prompt.keys_KxMxE),
        pad(prompt.values_KxMxE),
        jnp.pad(prompt.positions_M, ((0, 0), (0, spare))),
        jnp.sum(prompt.valid_M, -1, dtype=jnp.int32),
        overflow_B,
    )


def text_of(routing: RoutingConfig, caches: tuple[Cache, ...], lengths_B: jax.Array, step: jax.Array) -> Any:
    """All that is cached before `step`, as `thinking.sample.sample_thought` reads a text.

    Returns:
      A tuple with a dict {block name: tuple of Segments} for each group; leaves have a leading batch axis.
    """
    names = block_names(routing)
    segments = [c.segments(lengths_B, step) if isinstance(c, FullCache) else (c.segment(),) for c in caches]
    groups = range(0, len(caches), len(names))
    return tuple(dict(zip(names, segments[first : first + len(names)], strict=True)) for first in groups)


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache) if leaf.ndim == 4)

"""Keys and values kept while decoding, per block: all tokens for a full block, the computed ones for a routed block.

Layout: the prompt's keys/values and the generated tokens' are separate `KeyValues`. All rows of a batch write a
generated token's to the same slot (the step), so a full block's cache is updated in place by one slice; what differs
between rows, the prompt's length, is data in the masks. Several branches of one prompt, as in CoT-decoding, share its
keys/values: Q prompts, B rows, row q * branches + i is branch i of prompt q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.config import RoutingConfig
from mod_star.model.attention import KeyValues
from mod_star.model.transformer import block_names


@struct.dataclass
class FullCache:
    """Keys/values of a full block: the prompts' for Q prompts, the generated tokens' for B rows of T slots."""

    prompt: KeyValues
    """Leaves have a leading axis Q: one prompt for all of its B / Q branches."""
    keys_BxKxTxE: jax.Array
    values_BxKxTxE: jax.Array

    def shared_key_values(self) -> tuple[KeyValues, ...]:
        """What all branches of a prompt attend to; leaves have a leading axis Q."""
        return (self.prompt,)

    def own_key_values(self, lengths_B: jax.Array, step: jax.Array) -> tuple[KeyValues, ...]:
        """What the token of `step` (one for all rows, or one each) attends to besides that and itself; leaves have a
        leading axis B."""
        B, _, T, _ = self.keys_BxKxTxE.shape
        slots = jnp.arange(T, dtype=jnp.int32)
        generated = KeyValues(
            _read(self.keys_BxKxTxE),
            _read(self.values_BxKxTxE),
            lengths_B[:, None] + slots,
            jnp.ones((B, T), jnp.int32),
            jnp.broadcast_to(slots < step[..., None], (B, T)),
        )
        return (generated,)

    def append(self, own: KeyValues, step: jax.Array) -> FullCache:
        """With the keys/values of one token per row (B x K x 1 x E) in slot `step`, of each row its own if there are as
        many."""
        if step.ndim == 0:
            write = lambda cache, new: jax.lax.dynamic_update_slice_in_dim(cache, new, step, 2)  # noqa: E731
        else:
            write = lambda cache, new: write_rows(cache, new, step)  # noqa: E731
        return replace(
            self,
            keys_BxKxTxE=write(self.keys_BxKxTxE, _kept_as(self.keys_BxKxTxE, own.keys_KxMxE)),
            values_BxKxTxE=write(self.values_BxKxTxE, _kept_as(self.values_BxKxTxE, own.values_KxMxE)),
        )


@struct.dataclass
class RoutedCache:
    """Keys/values of the tokens that a routed block computed, in M slots and one more that is never read.

    With `routing.keep_key_values` those of all tokens.

    The spare slot takes the writes of rows that have nothing to write, which keeps the update free of branches.
    """

    prompt: KeyValues | None
    """The prompts', if they are shared by several branches, as in `FullCache`; else they fill the first slots."""
    keys_BxKxMxE: jax.Array
    values_BxKxMxE: jax.Array
    positions_BxM: jax.Array
    """int32 positions of the cached tokens."""
    filled_B: jax.Array
    """int32 slots filled here, without `prompt`."""
    count_B: jax.Array
    """int32 tokens computed, those of the prompt included."""
    overflow_B: jax.Array
    """int32 tokens that the causal rule selected but that passed by because no slot was left."""
    slots: int = struct.field(pytree_node=False)
    """The most tokens that the block may compute of a row, those of the prompt included."""
    open_B: jax.Array | None = None
    """int32 slots after `filled_B` that an open thought has taken; None where there can be none, see `open_caches`."""

    def of_turn(self, thought_B: jax.Array) -> RoutedCache:
        """As it is before the next token of every row, one of a thought in some rows: in the others none is open."""
        assert self.open_B is not None
        return replace(self, open_B=jnp.where(thought_B, self.open_B, 0))

    def free(self, thought_B: jax.Array | None, thought_slots: int) -> jax.Array:
        """bool B; whether the block may compute the next token: of a row's text, or of its open thought."""
        if thought_B is None:
            return self.count_B < self.slots
        return jnp.where(thought_B, self.taken_B - self.filled_B < thought_slots, self.count_B < self.slots)

    @property
    def taken_B(self) -> jax.Array:
        """int32 slots that are taken here, without `prompt`."""
        return self.filled_B if self.open_B is None else self.filled_B + self.open_B

    def shared_key_values(self) -> tuple[KeyValues, ...]:
        """As for `FullCache`."""
        return () if self.prompt is None else (self.prompt,)

    def own_key_values(self, lengths_B: jax.Array, step: jax.Array) -> tuple[KeyValues, ...]:
        """As for `FullCache`; what is cached says itself where it stands."""
        del lengths_B, step
        valid = jnp.arange(self.positions_BxM.shape[1], dtype=jnp.int32) < self.taken_B[:, None]
        ids = jnp.ones_like(self.positions_BxM)
        keys, values = _read(self.keys_BxKxMxE), _read(self.values_BxKxMxE)
        return (KeyValues(keys, values, self.positions_BxM, ids, valid),)

    def slots_of(self, stored_B: jax.Array) -> jax.Array:
        """int32, the slot that the next token of each row is written to."""
        return jnp.where(stored_B, self.taken_B, self.positions_BxM.shape[1] - 1)

    def write(self, own: KeyValues, rows_C: jax.Array, slot_C: jax.Array) -> RoutedCache:
        """With the keys/values of one token of some rows (C x K x 1 x E) in these slots. Nothing is counted.

        One row after the other: a slice is updated in place, whatever the layout.
        """
        keys, values = self.keys_BxKxMxE, self.values_BxKxMxE
        new_keys, new_values = _kept_as(keys, own.keys_KxMxE), _kept_as(values, own.values_KxMxE)
        for i in range(rows_C.shape[0]):
            place = (rows_C[i], 0, slot_C[i], 0)
            keys = jax.lax.dynamic_update_slice(keys, new_keys[i : i + 1], place)
            values = jax.lax.dynamic_update_slice(values, new_values[i : i + 1], place)
        return replace(self, keys_BxKxMxE=keys, values_BxKxMxE=values)

    def count(
        self,
        positions_B: jax.Array,
        stored_B: jax.Array,
        computed_B: jax.Array,
        overflow_B: jax.Array,
        thought_B: jax.Array | None = None,
    ) -> RoutedCache:
        """With the tokens counted whose keys/values have been written; those of thoughts take slots alone."""
        at_BxM = jnp.arange(self.positions_BxM.shape[1], dtype=jnp.int32) == self.slots_of(stored_B)[:, None]
        positions_BxM = jnp.where(at_BxM, positions_B[:, None], self.positions_BxM)
        open_B = self.open_B
        if thought_B is not None:
            open_B = None if open_B is None else open_B + (stored_B & thought_B)
            stored_B, computed_B, overflow_B = (each & ~thought_B for each in (stored_B, computed_B, overflow_B))
        return replace(
            self,
            positions_BxM=positions_BxM,
            open_B=open_B,
            filled_B=self.filled_B + stored_B,
            count_B=self.count_B + computed_B,
            overflow_B=self.overflow_B + overflow_B,
        )

    def append(
        self,
        own: KeyValues,
        stored_B: jax.Array,
        computed_B: jax.Array,
        overflow_B: jax.Array,
        thought_B: jax.Array | None = None,
    ) -> RoutedCache:
        """With the keys/values of one token in each row that stores them, computed tokens and overflows counted."""
        slot_B = self.slots_of(stored_B)
        if computed_B.shape[0] == 1:  # a slice is updated in place for certain, and fast
            write = lambda cache, new: jax.lax.dynamic_update_slice_in_dim(cache, new, slot_B[0], 2)  # noqa: E731
        else:
            write = lambda cache, new: write_rows(cache, new, slot_B)  # noqa: E731
        written = replace(
            self,
            keys_BxKxMxE=write(self.keys_BxKxMxE, _kept_as(self.keys_BxKxMxE, own.keys_KxMxE)),
            values_BxKxMxE=write(self.values_BxKxMxE, _kept_as(self.values_BxKxMxE, own.values_KxMxE)),
        )
        return written.count(own.positions_M[:, 0], stored_B, computed_B, overflow_B, thought_B)


Cache = FullCache | RoutedCache


def with_slots(prompt: KeyValues, slots: int) -> KeyValues:
    """Prompts' keys/values, leaves with a leading axis Q, with empty slots added so that there are that many."""
    spare = slots - prompt.positions_M.shape[-1]
    pad = lambda leaf, axis: jnp.pad(leaf, [(0, spare if i == axis else 0) for i in range(leaf.ndim)])  # noqa: E731
    return KeyValues(
        pad(prompt.keys_KxMxE, 2),
        pad(prompt.values_KxMxE, 2),
        pad(prompt.positions_M, 1),
        pad(prompt.segment_ids_M, 1),
        pad(prompt.valid_M, 1),
    )


def write_rows(cache_BxKxTxE: jax.Array, new_BxKx1xE: jax.Array, slots_B: jax.Array) -> jax.Array:
    """A cache with one token's keys or values in a slot of each row, in place."""
    rows = jnp.arange(slots_B.shape[0], dtype=jnp.int32)
    return cache_BxKxTxE.at[rows, :, slots_B].set(new_BxKx1xE[:, :, 0], unique_indices=True)


def in_bits(caches: tuple[Cache, ...]) -> tuple[Cache, ...]:
    """The caches with the rows' own bfloat16 keys and values as the uint16 that have their bits; others as they are.

    XLA's CPU compiler updates a slice of these in place. It writes the whole of a bfloat16 array anew, in float32.
    """
    bits = lambda a: jax.lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.bfloat16 else a  # noqa: E731
    return tuple(_with_slots(cache, bits) for cache in caches)


def in_values(caches: tuple[Cache, ...]) -> tuple[Cache, ...]:
    """What `in_bits` was given, with what has been written since."""
    return tuple(_with_slots(cache, _read) for cache in caches)


def _read(cache: jax.Array) -> jax.Array:
    """Keys or values of a cache, which may be `in_bits`."""
    return jax.lax.bitcast_convert_type(cache, jnp.bfloat16) if cache.dtype == jnp.uint16 else cache


def _kept_as(cache: jax.Array, new: jax.Array) -> jax.Array:
    """Keys or values as a cache keeps them."""
    return jax.lax.bitcast_convert_type(new, jnp.uint16) if cache.dtype == jnp.uint16 else new


def full_cache(prompt: KeyValues, new_tokens: int, branches: int = 1) -> FullCache:
    """Cache of a full block after prefill; `prompt` has leaves with a leading axis Q."""
    Q, K, _, E = prompt.keys_KxMxE.shape
    empty = jnp.zeros((Q * branches, K, new_tokens, E), prompt.keys_KxMxE.dtype)
    return FullCache(prompt, empty, empty)


def routed_cache(
    prompt: KeyValues,
    overflow_Q: jax.Array,
    slots: int,
    new_tokens: int,
    branches: int = 1,
    computed_Q: jax.Array | None = None,
) -> RoutedCache:
    """Cache of a routed block after prefill: the stored tokens of the prompt come first, then free slots.

    Args:
      prompt: keys/values of the prompts; leaves have a leading axis Q.
      overflow_Q: int32, tokens that passed by for want of a slot.
      slots: see `RoutedCache`.
      new_tokens: that may be generated.
      branches: rows per prompt.
      computed_Q: int32, tokens of each prompt that were computed, if all tokens are stored. None: those are stored.
    """
    filled_B, overflow_B = jnp.sum(prompt.valid_M, -1, dtype=jnp.int32), overflow_Q
    count_B = filled_B if computed_Q is None else computed_Q
    room = min(new_tokens, slots) if computed_Q is None else new_tokens
    if branches == 1:
        stored = prompt.positions_M.shape[1]
        spare = 1 + (slots - stored if computed_Q is None else new_tokens)
        pad = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, spare), (0, 0)))  # noqa: E731
        keys, values = pad(prompt.keys_KxMxE), pad(prompt.values_KxMxE)
        positions = jnp.pad(prompt.positions_M, ((0, 0), (0, spare)))
        return RoutedCache(None, keys, values, positions, filled_B, count_B, overflow_B, slots)
    Q, K, _, E = prompt.keys_KxMxE.shape
    B, own = Q * branches, room + 1
    empty, none = jnp.zeros((B, K, own, E), prompt.keys_KxMxE.dtype), jnp.zeros((B, own), jnp.int32)
    count_B, overflow_B = jnp.repeat(count_B, branches), jnp.repeat(overflow_B, branches)
    return RoutedCache(prompt, empty, empty, none, jnp.zeros_like(count_B), count_B, overflow_B, slots)


def open_caches(caches: tuple[Cache, ...], tokens: int, thought_slots: int) -> tuple[Cache, ...]:
    """The caches with room for an open thought in each row, right after its text. `close_caches` takes it away again.

    Args:
      caches: without such room.
      tokens: of a thought, <start> and <end> included.
      thought_slots: how many of them a routed block may compute.
    """

    def opened(cache: Cache) -> Cache:
        more = tokens if isinstance(cache, FullCache) else thought_slots
        wider = _with_slots(cache, lambda a: jnp.pad(a, [(0, more if i == 2 else 0) for i in range(a.ndim)]))
        if isinstance(wider, FullCache):
            return wider
        positions_BxM = jnp.pad(wider.positions_BxM, ((0, 0), (0, more)))
        return replace(wider, positions_BxM=positions_BxM, open_B=jnp.zeros_like(wider.filled_B))

    return tuple(map(opened, caches))


def close_caches(caches: tuple[Cache, ...], tokens: int, thought_slots: int) -> tuple[Cache, ...]:
    """What `open_caches` was given, with what has been written since; no thought may be open in an unfinished row."""

    def closed(cache: Cache) -> Cache:
        if isinstance(cache, FullCache):
            return _with_slots(cache, lambda a: a[:, :, : a.shape[2] - tokens])
        slots = cache.positions_BxM.shape[1] - thought_slots
        narrower = _with_slots(cache, lambda a: a[:, :, :slots])
        return replace(narrower, positions_BxM=cache.positions_BxM[:, :slots], open_B=None)

    return tuple(map(closed, caches))


def _with_slots(cache: Cache, change: Callable[[jax.Array], jax.Array]) -> Any:
    """The cache with its rows' keys and values changed, whose third axis is slots."""
    if isinstance(cache, FullCache):
        return replace(cache, keys_BxKxTxE=change(cache.keys_BxKxTxE), values_BxKxTxE=change(cache.values_BxKxTxE))
    return replace(cache, keys_BxKxMxE=change(cache.keys_BxKxMxE), values_BxKxMxE=change(cache.values_BxKxMxE))


def over_rows(function: Callable[[Any, Any], Any], rows: Any, shared: Any, branches: int) -> Any:
    """`function(row, shared by the branches of its prompt)` for all B rows.

    `vmap`s that leave what is shared unbatched among the branches: it is read once for all of them and never copied.

    Args:
      function: for one row.
      rows: leaves have a leading axis B; row q * branches + i is branch i of prompt q.
      shared: leaves have a leading axis Q = B / branches.
      branches: rows per prompt.
    """
    if branches == 1:
        return jax.vmap(function)(rows, shared)
    each = jax.vmap(function, (0, None))
    B = jax.tree.leaves(rows)[0].shape[0]
    if branches == B:
        return each(rows, jax.tree.map(lambda leaf: leaf[0], shared))
    split = jax.tree.map(lambda leaf: leaf.reshape(-1, branches, *leaf.shape[1:]), rows)
    return jax.tree.map(lambda leaf: leaf.reshape(B, *leaf.shape[2:]), jax.vmap(each)(split, shared))


def cached_memory(routing: RoutingConfig, caches: tuple[Cache, ...], lengths_B: jax.Array, step: jax.Array) -> Any:
    """All that is cached before `step`, as the memory of thoughts: what is a row's own, and what is shared.

    Returns:
      Twice a tuple with a dict {block name: tuple of KeyValues} for each group; leaves have a leading axis B, and Q. A
      row's memory is the tuples of both, see `join_memory`.
    """
    return (
        _by_group(routing, [cache.own_key_values(lengths_B, step) for cache in caches]),
        _by_group(routing, [cache.shared_key_values() for cache in caches]),
    )


def join_memory(own: Any, shared: Any) -> Any:
    """The memory of one row from the two parts of it that `cached_memory` gives."""
    return tuple(
        {name: (*of_prompts[name], *group[name]) for name in group}
        for group, of_prompts in zip(own, shared, strict=True)
    )


def _by_group(routing: RoutingConfig, key_values: list[tuple[KeyValues, ...]]) -> Any:
    names = block_names(routing)
    groups = range(0, len(key_values), len(names))
    return tuple(dict(zip(names, key_values[first : first + len(names)], strict=True)) for first in groups)


def reorder_cache(cache: Cache, rows_B: jax.Array) -> Cache:
    """Row b becomes a copy of row rows_B[b], which must be a branch of the same prompt. Prompts stay where they are."""
    own = replace(cache, prompt=None)  # type: ignore[arg-type]
    return replace(jax.tree.map(lambda leaf: leaf[rows_B], own), prompt=cache.prompt)


def take_prompts_of_cache(cache: Cache, prompts: jax.Array, rows: jax.Array) -> Cache:
    """The cache of some prompts, which have these rows."""
    return replace(reorder_cache(cache, rows), prompt=jax.tree.map(lambda leaf: leaf[prompts], cache.prompt))


def put_rows_of_cache(cache: Cache, taken: Cache, put: Callable[[jax.Array, jax.Array], jax.Array]) -> Cache:
    """The cache with what has become of some rows that were taken from it. Prompts stay as they are."""
    own, theirs = (replace(each, prompt=None) for each in (cache, taken))  # type: ignore[arg-type]
    return replace(jax.tree.map(put, own, theirs), prompt=cache.prompt)


def in_place_options() -> dict[str, bool] | None:
    """Options of XLA for a program that loops over caches, on the platform that JAX uses now.

    XLA's CPU compiler otherwise copies every cache twice per step, for fear that an old value were still read: 80 rows
    of a 135M-parameter model took 1.4 to 1.5 times as long.
    """
    return {"xla_cpu_copy_insertion_use_region_analysis": True} if jax.default_backend() == "cpu" else None


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache) if leaf.ndim == 4)

"""One token for every row of a batch through all blocks, against the caches; a routed block works for routed rows only.

The blocks are unrolled: slicing stacked weights inside the decoding loop would copy every layer's weights at every
step, and reading weights is what a decoding step spends its time on.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mod_star.decoding.caches import Cache, FullCache, RoutedCache, over_rows
from mod_star.distributed.sharding import for_own_rows
from mod_star.model import Decoder
from mod_star.model.attention import KeyValues
from mod_star.model.layers import lookup, rms_norm
from mod_star.model.product_weights import narrow_types
from mod_star.model.routing import Tokens, causal_logit, routed_rows, routed_share, select_top, stochastic_noise
from mod_star.model.rows import Picked, compute_if, in_chunks, rows_at_once
from mod_star.model.transformer import StackedParams, UnstackedParams, block_names, group_count


def unstack(decoder: Decoder, params: StackedParams) -> UnstackedParams:
    """Params in the form that `decode_step` takes.

    Do it once per model, outside of `jit`; it copies the blocks' weights.
    """
    count = group_count(decoder.config, decoder.routing)
    groups = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params["groups"]) for i in range(count))
    return UnstackedParams({**params, "groups": groups})


def own_params(decoder: Decoder, params: StackedParams, donate: bool = False) -> UnstackedParams:
    """Params as decoding takes them, in memory that nobody else holds: unstacked, and in `narrow_types`.

    Args:
      decoder: the model.
      params: as trained; or on disk, see `is_on_disk`. What is on disk is read slice by slice: at no time is there more
        than the result and a slice.
      donate: delete the arrays of `params` one by one as they have been taken over, so that the weights never exist
        twice. Nobody can use those arrays afterwards.
    """
    count = group_count(decoder.config, decoder.routing)
    taken: dict[int, Any] = {}  # an array that is there twice, as tied weights may be, is taken over once

    def take(leaf: Any, dtype: Any, stacked: bool) -> Any:
        if id(leaf) not in taken:
            taken[id(leaf)] = _taken_over(leaf, dtype, count if stacked else None, donate)
        return taken[id(leaf)]

    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    types = jax.tree.leaves(narrow_types(decoder, params))
    own = [take(leaf, dtype, path[0].key == "groups") for (path, leaf), dtype in zip(leaves, types, strict=True)]
    whole = jax.tree.unflatten(tree, own)
    blocks: Any = jax.tree.structure(params["groups"])
    by_leaf = blocks.flatten_up_to(whole["groups"])
    groups = tuple(blocks.unflatten([leaf[i] for leaf in by_leaf]) for i in range(count))
    return UnstackedParams({**whole, "groups": groups})


def is_on_disk(params: StackedParams) -> bool:
    """Whether leaves of params are not arrays, but read themselves when they are asked for: as a whole by NumPy, or a
    slice of the first axis with [i]. `mod_star.runs.params_file.StoredArray` is one."""
    return not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(params))


def _taken_over(leaf: Any, dtype: Any, slices: int | None, donate: bool) -> Any:
    """A copy of an array, or a tuple of copies of its slices; the array itself if it is donated and needs no change."""
    if not isinstance(leaf, jax.Array | np.ndarray):  # what is read is nobody else's
        if slices is None:
            return jax.device_put(np.asarray(leaf, dtype), may_alias=True)
        return tuple(jax.device_put(np.asarray(leaf[i], dtype), may_alias=True) for i in range(slices))
    source = leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)
    if slices is not None:
        own: Any = tuple(source[i].astype(dtype) for i in range(slices))
    elif source.dtype != dtype:
        own = source.astype(dtype)
    elif donate or source is not leaf:
        return source
    else:
        own = jnp.copy(source)
    if donate and isinstance(leaf, jax.Array):
        leaf.delete()
    return own


@struct.dataclass
class NewTokens:
    """A token for every row of a batch."""

    tokens_B: jax.Array
    """int32 the rows' tokens."""
    lengths_B: jax.Array
    """int32 prompt lengths; the token's position is this plus `step`."""
    step: jax.Array
    """int32; how many tokens each row has generated before, those of an open thought included: a scalar, or B."""
    active_B: jax.Array
    """bool; rows that are finished are computed in full blocks but never in routed ones."""
    inputs_BxD: jax.Array | None = None
    """What the first block reads; None: the tokens' embeddings."""
    thought_B: jax.Array | None = None
    """bool; the token is one of an open thought, see `mod_star.decoding.own_pace`. None: of none."""
    thought_slots: int = struct.field(pytree_node=False, default=0)
    """Tokens that a routed block may compute of a thought."""


def decode_step(
    decoder: Decoder,
    params: UnstackedParams,
    caches: tuple[Cache, ...],
    new: NewTokens,
    branches: int = 1,
    key: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Runs one token of every row.

    Args:
      decoder: the model.
      params: from `own_params`, or `unstack`.
      caches: one per block, in order.
      new: the tokens.
      branches: rows per prompt, see `caches.over_rows`.
      key: of stochastic routing, the same as for the prefill.

    Returns:
      Hidden states BxD after the final norm, and the caches with the token in them.
    """
    config, routing = decoder.config, decoder.routing
    x_BxD = lookup(params["embedding"], new.tokens_B) if new.inputs_BxD is None else new.inputs_BxD
    x_BxD, thought_B = x_BxD.astype(config.dtype), new.thought_B
    positions_B = new.lengths_B + new.step
    names = block_names(routing)
    updated: list[Cache] = []
    for index, group in enumerate(params["groups"]):
        group_key = None if key is None else jax.random.fold_in(key, index)
        for name in names:
            cache, block = caches[len(updated)], group[name]
            if thought_B is not None and isinstance(cache, RoutedCache):
                cache = cache.of_turn(thought_B)
            own_memory = cache.own_key_values(new.lengths_B, new.step)
            if isinstance(cache, FullCache):
                full_row = functools.partial(_full_row, decoder, block)
                delta_BxD, own = over_rows(
                    full_row, (x_BxD, positions_B, own_memory), cache.shared_key_values(), branches
                )
                updated.append(cache.append(own, new.step))
            else:
                scores_B = decoder.parts.score(block["router"], x_BxD, routing)
                noise = stochastic_noise(group_key, positions_B)
                passing_B = causal_logit(decoder, block, x_BxD, scores_B, noise) > 0
                passing_B &= new.active_B
                computed_B = passing_B & cache.free(thought_B, new.thought_slots)
                rows = RoutedRows(x_BxD, scores_B, positions_B, computed_B, new.active_B)
                if branches == 1 < len(x_BxD):
                    in_place = functools.partial(_in_place, decoder)
                    delta_BxD, cache, computed_B = for_own_rows(in_place, (rows, cache), block)
                    stored_B = new.active_B if routing.keep_key_values else computed_B
                    overflow_B = passing_B & ~computed_B
                    updated.append(cache.count(positions_B, stored_B, computed_B, overflow_B, thought_B))
                else:
                    if routing.decoded_rows == "fixed":
                        rows = replace(rows, computed_B=_within_a_chunk(decoder, rows, branches))
                    routed_row = functools.partial(_routed_row, decoder, block)
                    arrays = (rows, own_memory)
                    delta_BxD, own = over_rows(routed_row, arrays, cache.shared_key_values(), branches)
                    computed_B, stored_B = rows.computed_B, rows.computed_B
                    if routing.keep_key_values:
                        own, stored_B = kept_rows(decoder, block, rows), new.active_B
                    updated.append(cache.append(own, stored_B, computed_B, passing_B & ~computed_B, thought_B))
                adapted_BxD = decoder.parts.adapt(block.get("adapter", {}), x_BxD, routing)
                if adapted_BxD is not None:
                    delta_BxD += jnp.where(computed_B[:, None], 0, adapted_BxD)
            x_BxD = x_BxD + delta_BxD
    return rms_norm(x_BxD, params["final_norm"], config.norm_eps), tuple(updated)


def _full_row(
    decoder: Decoder, block: dict[str, Any], row: tuple[Any, ...], prompt: tuple[KeyValues, ...]
) -> tuple[jax.Array, KeyValues]:
    """Delta D and keys/values of one token."""
    x_D, position, own_memory = row
    one = jnp.ones(1, jnp.int32)
    delta, own, _ = decoder.parts.compute_block(
        block["block"], x_D[None], position[None], one, one > 0, (*prompt, *own_memory), decoder.config
    )
    return delta[0], own


@struct.dataclass
class RoutedRows:
    """A token for every row of a batch, as a routed block takes them."""

    x_BxD: jax.Array
    """The stream, in the compute type."""
    scores_B: jax.Array
    """float32 router scores."""
    positions_B: jax.Array
    """int32."""
    computed_B: jax.Array
    """bool; whether the block computes the row."""
    active_B: jax.Array
    """bool; rows that are not finished."""


def kept_rows(decoder: Decoder, block: dict[str, Any], rows: RoutedRows) -> KeyValues:
    """Keys/values of one token per row, computed or not; leaves have a leading axis B."""

    def one(x_D: jax.Array, position: jax.Array) -> KeyValues:
        token = Tokens(x_D[None], position[None], jnp.ones(1, jnp.int32))
        return decoder.parts.keys_values(block["block"], token, decoder.config)

    return jax.vmap(one)(rows.x_BxD, rows.positions_B)


def within_a_chunk(wanted_R: jax.Array, scores_R: jax.Array, share: float) -> jax.Array:
    """bool R: of the wanted rows as many as a chunk holds, those with the highest scores, of equal ones the first.

    Args:
      wanted_R: bool.
      scores_R: float32.
      share: as for `mod_star.model.rows.compute_rows`.
    """
    return select_top(scores_R, wanted_R, rows_at_once(len(wanted_R), share)).mask_S


def _within_a_chunk(decoder: Decoder, rows: RoutedRows, branches: int) -> jax.Array:
    """bool B: of the rows to compute those that a chunk holds, among the branches of each prompt."""
    share = routed_share(decoder.routing, decoder.config.context)
    split = lambda values_B: values_B.reshape(-1, branches)  # noqa: E731
    within = jax.vmap(functools.partial(within_a_chunk, share=share))
    return within(split(rows.computed_B), split(rows.scores_B)).reshape(-1)


def _in_place(
    decoder: Decoder, rows_and_cache: tuple[RoutedRows, RoutedCache], block: dict[str, Any]
) -> tuple[jax.Array, RoutedCache, jax.Array]:
    """Gated deltas BxD, zero where a row passes by; the cache with the keys/values of the others; which these are, B.

    In chunks of the rows that are computed. Each reads its keys where they lie, and writes its own beside them: nothing
    of a cache's size is copied.
    """
    rows, cache = rows_and_cache
    share = routed_share(decoder.routing, decoder.config.context)
    fixed, keeps = decoder.routing.decoded_rows == "fixed", decoder.routing.keep_key_values
    if fixed:
        rows = replace(rows, computed_B=within_a_chunk(rows.computed_B, rows.scores_B, share))
    slot_B = cache.slots_of(rows.active_B if keeps else rows.computed_B)

    def chunk(picked: Picked, carry: tuple[jax.Array, RoutedCache]) -> tuple[jax.Array, RoutedCache]:
        delta_BxD, cache = carry
        (memory,) = cache.own_key_values(rows.positions_B, jnp.int32(0))

        def one(row: RoutedRows, entry: jax.Array) -> tuple[jax.Array, KeyValues]:
            return _compute_row(decoder, block, row, (replace(memory, entry=entry),))

        new_CxD, own = jax.vmap(one)(picked.of(rows), jnp.where(picked.needed_C, picked.rows_C, -1))
        # Written when all has been read: else XLA would have to keep what was there.
        new_CxD, own = jax.lax.optimization_barrier((new_CxD, own))
        if not keeps:
            slot_C = jnp.where(picked.needed_C, picked.of(slot_B), cache.positions_BxM.shape[1] - 1)
            cache = cache.write(own, picked.rows_C, slot_C)
        return picked.put(delta_BxD, new_CxD), cache

    delta_BxD, cache = in_chunks(chunk, rows.computed_B, (jnp.zeros_like(rows.x_BxD), cache), share, fixed)
    if keeps:
        own = kept_rows(decoder, block, rows)
        delta_BxD, own = jax.lax.optimization_barrier((delta_BxD, own))
        cache = cache.write(own, jnp.arange(len(slot_B), dtype=jnp.int32), slot_B)
    return delta_BxD, cache, rows.computed_B


def _routed_row(
    decoder: Decoder, block: dict[str, Any], row: tuple[RoutedRows, tuple[KeyValues, ...]], prompt: Any
) -> tuple[jax.Array, KeyValues]:
    """Gated delta D and keys/values of one token if it is to be computed, else zeros."""
    token, own_memory = row
    share, fixed = routed_share(decoder.routing, decoder.config.context), decoder.routing.decoded_rows == "fixed"
    compute = functools.partial(_compute_row, decoder)
    arrays = (block, token, (*prompt, *own_memory))
    result: tuple[jax.Array, KeyValues] = compute_if(token.computed_B, compute, arrays, share, fixed)
    return result


def _compute_row(
    decoder: Decoder, block: dict[str, Any], row: RoutedRows, memory: tuple[KeyValues, ...]
) -> tuple[jax.Array, KeyValues]:
    """Gated delta D and keys/values of one token, one of `RoutedRows`."""
    one = jnp.ones(1, jnp.int32)
    token = Tokens(row.x_BxD[None], row.positions_B[None], one)
    delta, _, own, _ = routed_rows(decoder, block, token, row.scores_B[None], one > 0, memory)
    return delta[0], own

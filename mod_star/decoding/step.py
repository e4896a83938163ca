"""One token for every row of a batch through all blocks, against the caches; a routed block works for routed rows only.

The blocks are unrolled: slicing stacked weights inside the decoding loop would copy every layer's weights at every
step, and reading weights is what a decoding step spends its time on.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.decoding.caches import Cache, FullCache, over_rows
from mod_star.model import Decoder
from mod_star.model.attention import KeyValues
from mod_star.model.layers import lookup, rms_norm
from mod_star.model.parts import DEFAULT_PARTS
from mod_star.model.routing import Tokens, causal_logit, routed_rows, routed_share, stochastic_noise
from mod_star.model.rows import compute_if
from mod_star.model.transformer import StackedParams, UnstackedParams, block_names, group_count


def unstack(decoder: Decoder, params: StackedParams) -> UnstackedParams:
    """Params in the form that `decode_step` takes.

    Do it once per model, outside of `jit`; it copies the blocks' weights.
    """
    count = group_count(decoder.config, decoder.routing)
    groups = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params["groups"]) for i in range(count))
    return UnstackedParams({**params, "groups": groups})


def own_params(decoder: Decoder, params: StackedParams, donate: bool = False) -> UnstackedParams:
    """Params as decoding takes them, in memory that nobody else holds: unstacked, and narrow where `narrowed` says so.

    Args:
      decoder: the model.
      params: as trained.
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
    types = jax.tree.leaves(narrowed(decoder, params))
    own = [take(leaf, dtype, path[0].key == "groups") for (path, leaf), dtype in zip(leaves, types, strict=True)]
    whole = jax.tree.unflatten(tree, own)
    blocks: Any = jax.tree.structure(params["groups"])
    by_leaf = blocks.flatten_up_to(whole["groups"])
    groups = tuple(blocks.unflatten([leaf[i] for leaf in by_leaf]) for i in range(count))
    return UnstackedParams({**whole, "groups": groups})


def _taken_over(leaf: Any, dtype: Any, slices: int | None, donate: bool) -> Any:
    """A copy of an array, or a tuple of copies of its slices; the array itself if it is donated and needs no change."""
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


def narrowed(decoder: Decoder, params: StackedParams) -> dict[str, Any]:
    """The type that each of the params is kept in for decoding: weights of matrix products in the compute type, which
    they are rounded to at every use anyway.

    A decoding step spends its time reading them. What computes in float32 (norms, router, predictor, mixing head) stays
    as it is, and so do a user's parts.
    """
    dtype, parts = decoder.config.dtype, decoder.parts
    if dtype == "float32":
        return jax.tree.map(lambda leaf: leaf.dtype, params)
    names: set[str] = set()
    if parts.block is DEFAULT_PARTS.block:
        names |= {"query", "key", "value", "output"}
    if parts.feed_forward is DEFAULT_PARTS.feed_forward:
        names |= {"gate", "up", "down"}

    def narrow(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        keys = [getattr(entry, "key", None) for entry in path]
        top = len(keys) == 1 and keys[0] in ("embedding", "head")
        return jnp.dtype(dtype) if top or ("block" in keys and keys[-1] in names) else leaf.dtype

    return jax.tree_util.tree_map_with_path(narrow, params)


@struct.dataclass
class NewTokens:
    """A token for every row of a batch."""

    tokens_B: jax.Array
    """int32 the rows' tokens."""
    lengths_B: jax.Array
    """int32 prompt lengths; the token's position is this plus `step`."""
    step: jax.Array
    """int32 scalar; how many tokens each row has generated before."""
    active_B: jax.Array
    """bool; rows that are finished are computed in full blocks but never in routed ones."""


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
    x_BxD = lookup(params["embedding"], new.tokens_B).astype(config.dtype)
    positions_B = new.lengths_B + new.step
    names = block_names(routing)
    updated: list[Cache] = []
    for index, group in enumerate(params["groups"]):
        group_key = None if key is None else jax.random.fold_in(key, index)
        for name in names:
            cache, block = caches[len(updated)], group[name]
            own_memory = cache.own_key_values(new.lengths_B, new.step)
            if isinstance(cache, FullCache):
                full_row = functools.partial(_full_row, decoder, block)
                delta_BxD, own = over_rows(
                    full_row, (x_BxD, positions_B, own_memory), cache.shared_key_values(), branches
                )
                updated.append(cache.append(own, new.step))
            else:
                scores_B = decoder.parts.score(block["router"], x_BxD)
                noise = stochastic_noise(group_key, positions_B)
                passing_B = causal_logit(decoder, block, x_BxD, scores_B, noise) > 0
                passing_B &= new.active_B
                computed_B = passing_B & (cache.count_B < cache.slots)
                routed_row = functools.partial(_routed_row, decoder, block)
                rows = (computed_B, x_BxD, scores_B, positions_B, own_memory)
                delta_BxD, own = over_rows(routed_row, rows, cache.shared_key_values(), branches)
                updated.append(cache.append(own, computed_B, passing_B & ~computed_B))
            x_BxD = x_BxD + delta_BxD
    return rms_norm(x_BxD, params["final_norm"], config.norm_eps), tuple(updated)


def _full_row(
    decoder: Decoder, block: dict[str, Any], row: tuple[Any, ...], prompt: tuple[KeyValues, ...]
) -> tuple[jax.Array, KeyValues]:
    """Delta D and keys/values of one token."""
    x_D, position, own_memory = row
    one = jnp.ones(1, jnp.int32)
    delta, own = decoder.parts.compute_block(
        block["block"], x_D[None], position[None], one, one > 0, (*prompt, *own_memory), decoder.config
    )
    return delta[0], own


def _routed_row(
    decoder: Decoder, block: dict[str, Any], row: tuple[Any, ...], prompt: tuple[KeyValues, ...]
) -> tuple[jax.Array, KeyValues]:
    """Gated delta D and keys/values of one token if it is to be computed, else zeros."""
    computed, *values = row

    def compute(
        block: Any, x_D: jax.Array, score: jax.Array, position: jax.Array, memory: tuple[KeyValues, ...]
    ) -> tuple[jax.Array, KeyValues]:
        one = jnp.ones(1, jnp.int32)
        token = Tokens(x_D[None], position[None], one)
        delta, _, own = routed_rows(decoder, block, token, score[None], one > 0, memory)
        return delta[0], own

    *token, own_memory = values
    share = routed_share(decoder.routing, decoder.config.context)
    result: tuple[jax.Array, KeyValues] = compute_if(computed, compute, (block, *token, (*prompt, *own_memory)), share)
    return result

"""One token for every row of a batch through all blocks, against the caches; a routed block works for routed rows only.

The blocks are unrolled: slicing stacked weights inside the decoding loop would copy every layer's weights at every
step, and reading weights is what a decoding step spends its time on.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.decoding.caches import Cache, FullCache
from mod_star.model import Decoder
from mod_star.model.attention import Segment
from mod_star.model.layers import rms_norm
from mod_star.model.routing import routed_share
from mod_star.model.rows import compute_rows
from mod_star.model.transformer import (
    block_names,
    causal_logit,
    group_count,
    head_matrix,
    routed_rows,
    stochastic_noise,
)


def unstack(decoder: Decoder, params: dict[str, Any]) -> dict[str, Any]:
    """Params with the groups as a tuple of dicts instead of stacked arrays: what `decode_step` takes.

    Do it once per model, outside of `jit`; it copies the blocks' weights.
    """
    count = group_count(decoder.config, decoder.routing)
    groups = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params["groups"]) for i in range(count))
    return {**params, "groups": groups}


def logits_of(params: dict[str, Any], hidden_BxD: jax.Array) -> jax.Array:
    """Float32 logits BxV."""
    head = head_matrix(params).astype(hidden_BxD.dtype)
    return jnp.einsum("bd,vd->bv", hidden_BxD, head, preferred_element_type=jnp.float32)


def decode_step(
    decoder: Decoder,
    params: dict[str, Any],
    caches: tuple[Cache, ...],
    tokens_B: jax.Array,
    lengths_B: jax.Array,
    step: jax.Array,
    active_B: jax.Array,
    key: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Runs generated token number `step` of every row.

    Args:
      decoder: the model.
      params: from `unstack`.
      caches: one per block, in order.
      tokens_B: int32 the rows' tokens.
      lengths_B: int32 prompt lengths; the token's position is this plus `step`.
      step: int32 scalar.
      active_B: bool; rows that are finished are computed in full blocks but never in routed ones.
      key: of stochastic routing, the same as for the prefill.

    Returns:
      Hidden states BxD after the final norm, and the caches with the token in them.
    """
    config, routing = decoder.config, decoder.routing
    x_BxD = jnp.take(params["embedding"], tokens_B, axis=0, mode="clip").astype(config.dtype)
    positions_B = lengths_B + step
    names = block_names(routing)
    updated: list[Cache] = []
    for index, group in enumerate(params["groups"]):
        group_key = None if key is None else jax.random.fold_in(key, index)
        for name in names:
            cache, block = caches[len(updated)], group[name]
            if isinstance(cache, FullCache):
                delta_BxD, own = _full_rows(decoder, block, x_BxD, positions_B, cache.segments(lengths_B, step))
                updated.append(cache.append(own, step))
            else:
                scores_B = decoder.parts.router.apply(block["router"], x_BxD)
                noise_B = stochastic_noise(group_key, positions_B, routing)
                wanted_B = causal_logit(block, x_BxD, scores_B, noise_B, routing, config.context) > 0
                wanted_B &= active_B
                computed_B = wanted_B & (cache.count_B < cache.slots)
                delta_BxD, own = compute_rows(
                    functools.partial(_routed_rows, decoder, block), computed_B,
                    (x_BxD, scores_B, positions_B, cache.segment()), routed_share(routing, config.context),
                )  # fmt: skip
                updated.append(cache.append(own, computed_B, wanted_B & ~computed_B))
            x_BxD = x_BxD + delta_BxD
    return rms_norm(x_BxD, params["final_norm"], config.norm_eps), tuple(updated)


def _full_rows(
    decoder: Decoder, block: dict[str, Any], x_BxD: jax.Array, positions_B: jax.Array, context: tuple[Segment, ...]
) -> tuple[jax.Array, Segment]:
    def row(x_D: jax.Array, position: jax.Array, context: tuple[Segment, ...]) -> tuple[jax.Array, Segment]:
        one = jnp.ones(1, jnp.int32)
        delta, own = decoder.parts.block.apply(
            block["block"], x_D[None], position[None], one, one > 0, context, decoder.config, decoder.parts
        )
        return delta[0], own

    return jax.vmap(row)(x_BxD, positions_B, context)


def _routed_rows(
    decoder: Decoder,
    block: dict[str, Any],
    x_NxD: jax.Array,
    scores_N: jax.Array,
    positions_N: jax.Array,
    context: Segment,
) -> tuple[jax.Array, Segment]:
    """Gated delta and keys/values of N rows, each one token with a cache of its own."""

    def row(x_D: jax.Array, score: jax.Array, position: jax.Array, context: Segment) -> tuple[jax.Array, Segment]:
        one = jnp.ones(1, jnp.int32)
        delta, _, own = routed_rows(
            block, x_D[None], score[None], position[None], one, one > 0, (context,),
            decoder.config, decoder.routing, decoder.parts,
        )  # fmt: skip
        return delta[0], own

    return jax.vmap(row)(x_NxD, scores_N, positions_N, context)

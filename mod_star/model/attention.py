"""One attention primitive: softmax over several segments of keys and values at once.

A segment is a set of keys/values with what decides who may look at it: positions, document ids and validity. A
training step attends to one segment, its own tokens; decoding to the prompt's, the generated tokens' and its own;
nothing else about the network changes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.config import ModelConfig
from mod_star.model.precision import precision_of


@struct.dataclass
class KeyValues:
    """Keys and values of M tokens.

    A query of document d at position p sees token m iff `valid[m]`, `segment_ids[m] == d` and `positions[m] <= p`;
    with a sliding window W also `positions[m] > p - W`.
    """

    keys_KxMxE: jax.Array
    values_KxMxE: jax.Array
    positions_M: jax.Array
    """int32 positions inside the document."""
    segment_ids_M: jax.Array
    """int32 document ids; 0 marks padding."""
    valid_M: jax.Array
    """bool; False for slots that hold no token."""


def visible(
    segment: KeyValues, positions_N: jax.Array, segment_ids_N: jax.Array, window: int | None = None
) -> jax.Array:
    """Bool NxM: which of the keys each query sees. `window` counts positions, the query's own included."""
    same = segment_ids_N[:, None] == segment.segment_ids_M
    seen = same & (segment.positions_M <= positions_N[:, None]) & segment.valid_M
    return seen if window is None else seen & (segment.positions_M > positions_N[:, None] - window)


def attend(
    query_NxHxE: jax.Array,
    positions_N: jax.Array,
    segment_ids_N: jax.Array,
    segments: Sequence[KeyValues],
    *,
    window: int | None = None,
    fused: bool = False,
    precision: str = "highest",
) -> jax.Array:
    """Softmax attention over the union of `segments`; scores and softmax in float32.

    Args:
      query_NxHxE: rotated queries. H must be a multiple of the segments' K (grouped-query attention).
      positions_N: int32 positions of the queries.
      segment_ids_N: int32 document ids of the queries.
      segments: at least one; a query that sees no token at all gets a finite, meaningless result.
      window: length of the sliding window, see `KeyValues`; None: none.
      fused: use cuDNN's fused kernel through `jax.nn.dot_product_attention` (one segment, GPU, 16-bit types).
      precision: of products of float32 operands, see `mod_star.model.precision`.

    Returns:
      NxHxE in the type of the query.
    """
    if fused and len(segments) == 1:
        (only,) = segments
        keys, values = (jnp.swapaxes(a, 0, 1) for a in (only.keys_KxMxE, only.values_KxMxE))
        mask = visible(only, positions_N, segment_ids_N, window)
        # One mask per head, though they are the same: JAX's rule for this call under vmap reshapes it to that.
        mask = jnp.broadcast_to(mask, (query_NxHxE.shape[1], *mask.shape))
        return jax.nn.dot_product_attention(query_NxHxE, keys, values, mask=mask, implementation="cudnn")

    N, H, E = query_NxHxE.shape
    K = segments[0].keys_KxMxE.shape[0]
    query_KxGNxE = (query_NxHxE * E**-0.5).reshape(N, K, H // K, E).transpose(1, 2, 0, 3).reshape(K, -1, E)

    product = functools.partial(
        jnp.einsum, precision=precision_of(query_NxHxE.dtype, precision), preferred_element_type=jnp.float32
    )

    def weigh(weight_KxGNxM: jax.Array, segment: KeyValues) -> jax.Array:
        weight_KxGNxM = weight_KxGNxM.astype(query_NxHxE.dtype)
        return product("knm,kme->kne", weight_KxGNxM, segment.values_KxMxE)

    scores = []
    for segment in segments:
        score = product("kne,kme->knm", query_KxGNxE, segment.keys_KxMxE)
        mask = visible(segment, positions_N, segment_ids_N, window)
        score = score.reshape(K, H // K, N, -1)
        scores.append(jnp.where(mask, score, -1e30).reshape(K, H // K * N, -1))
    highest = functools.reduce(jnp.maximum, [score.max(-1, keepdims=True) for score in scores])
    weights = [jnp.exp(score - jax.lax.stop_gradient(highest)) for score in scores]
    total = functools.reduce(jnp.add, [weight.sum(-1, keepdims=True) for weight in weights])
    mixed = functools.reduce(jnp.add, [weigh(*pair) for pair in zip(weights, segments, strict=True)])
    mixed_KxGxNxE = (mixed / total).astype(query_NxHxE.dtype).reshape(K, H // K, N, E)
    return mixed_KxGxNxE.transpose(2, 0, 1, 3).reshape(N, H, E)


def use_fused(config: ModelConfig, tokens: int) -> bool:
    """Whether `config.attention` means the fused kernel for a block of `tokens`, on the platform that JAX uses now.

    auto takes it only where cuDNN can: its backward pass with a mask wants even lengths, and odd capacities are common.
    """
    if config.attention == "auto":
        possible = config.dtype == "bfloat16" and tokens % 2 == 0 and config.head_size % 8 == 0
        return possible and config.head_size <= 128 and jax.default_backend() == "gpu"
    return config.attention == "fused"

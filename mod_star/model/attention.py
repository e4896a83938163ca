"""One attention primitive: softmax over several sets of keys and values at once.

A `KeyValues` is one set, with what decides who may look at it: positions, document ids and validity. A training step
attends to one, its own tokens; decoding attends to three: the prompt, the generated tokens and its own. Nothing else
about the network changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.model.attention_entries import attention_to_entry
from mod_star.model.attention_primitive import attention
from mod_star.model.attention_whole import Memory, Queries, union
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
    until: jax.Array | None = None
    """int32 scalar; the last position that may be seen of these tokens, if that is not each query's own."""
    entry: jax.Array | None = None
    """int32 scalar; the other leaves but `until` are those of many sequences, with a leading axis C, and this one is
    meant. Under a `vmap` that gives each row an entry of its own, `attend` reads the keys where they lie. No gradient.
    See `mod_star.model.attention_entries`."""


def attend(
    query_NxHxE: jax.Array,
    positions_N: jax.Array,
    segment_ids_N: jax.Array,
    key_values: Sequence[KeyValues],
    *,
    window: int | None = None,
    precision: str = "highest",
    plain: bool = False,
) -> jax.Array:
    """Softmax attention over the union of `key_values`; scores and softmax in float32.

    Args:
      query_NxHxE: rotated queries. H must be a multiple of their K (grouped-query attention).
      positions_N: int32 positions of the queries.
      segment_ids_N: int32 document ids of the queries.
      key_values: at least one; a query that sees no token at all gets a finite, meaningless result.
      window: length of the sliding window, see `KeyValues`; None: none.
      precision: of products of float32 operands, see `mod_star.model.precision`.
      plain: compute it by plain products on every platform, see `mod_star.config.ModelConfig.attention`.

    Returns:
      NxHxE in the type of the query.
    """
    N, H, E = query_NxHxE.shape
    K = key_values[0].keys_KxMxE.shape[-3]
    query_KxGxNxE = (query_NxHxE * E**-0.5).reshape(N, K, H // K, E).transpose(1, 2, 0, 3)
    after_N = jnp.full(N, jnp.iinfo(jnp.int32).min) if window is None else positions_N - window
    queries = Queries(query_KxGxNxE[None], segment_ids_N[None], after_N[None])
    mesh = jax.sharding.get_abstract_mesh()
    product_precision = precision_of(query_NxHxE.dtype, precision)
    pieces = [
        attention_to_entry(queries, _memory(each, positions_N), each.entry, product_precision)
        for each in key_values
        if each.entry is not None
    ]
    memories = [_memory(each, positions_N) for each in key_values if each.entry is None]
    if memories:
        pieces.append(attention(queries, memories, product_precision, None if mesh.empty else mesh, plain))
    mixed = pieces[0][0] if len(pieces) == 1 else union(pieces)[0].astype(query_NxHxE.dtype)
    return mixed[0].transpose(2, 0, 1, 3).reshape(N, H, E)


def _memory(key_values: KeyValues, positions_N: jax.Array) -> Memory:
    ids_M = jnp.where(key_values.valid_M, key_values.segment_ids_M, -1)
    until_N = positions_N if key_values.until is None else jnp.minimum(positions_N, key_values.until)
    keys, values, positions = key_values.keys_KxMxE, key_values.values_KxMxE, key_values.positions_M
    if key_values.entry is None:
        keys, values, ids_M, positions = (leaf[None] for leaf in (keys, values, ids_M, positions))
    return Memory(keys, values, ids_M, positions, until_N[None])

"""Attention of each row of a batch to one entry of a memory that all rows share, such as to its own row of a cache.

A `vmap` over rows whose keys were gathered first would copy them. A TPU reads them where they lie, row after row. Only
where they are few does it copy them: there, starting an instruction takes longer than a copy. Other platforms gather
the entries that are asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.model.attention_whole import HIDDEN, Memory, Queries, over_seen, seen
from mod_star.model.linear import FEWEST_ON_TPUS

Results = tuple[jax.Array, jax.Array]

FEW_BYTES = 2**21
"""Of an entry's keys and values. By XLA's estimates a TPU v5e copies so many for each row of a chunk in the time that
the ten instructions take to start which read a wanted row in turn."""


def attention_to_entry(queries: Queries, memory: Memory, entry: jax.Array, precision: Any) -> Results:
    """`attention_whole.forward` of one row of queries over one entry of a memory. `vmap` it over rows.

    Args:
      queries: one row.
      memory: C entries; `until_BxN` is of the queries' row.
      entry: int32 scalar, which of them. Negative: none, and the result has no meaning. A TPU reads nothing for the
        rows after the last that has an entry.
      precision: of products of float32 operands.

    Returns:
      Float32 1xKxGxNxE, and float32 log-sum-exp 1xKxGxN.
    """

    @jax.custom_batching.custom_vmap
    def one(queries: Queries, until_1xN: jax.Array, entry: jax.Array, *whole: jax.Array) -> Results:
        return _gathered(queries, until_1xN, entry[None], whole, precision)

    @one.def_vmap
    def many(size: int, in_batched: Sequence[Any], *args: Any) -> tuple[Results, Any]:
        own, whole = args[:3], args[3:]
        if any(in_batched[3:]):
            raise NotImplementedError("a memory with entries cannot be batched: its rows share it")
        spread = lambda leaf, batched: leaf if batched else jnp.broadcast_to(leaf, (size, *leaf.shape))  # noqa: E731
        queries, until, entry_R = jax.tree.map(spread, own, tuple(in_batched[:3]))
        queries, until = jax.tree.map(lambda leaf: leaf[:, 0], (queries, until))
        result = jax.lax.platform_dependent(
            queries, until, entry_R, whole,
            tpu=functools.partial(_on_tpu, precision=precision),
            default=functools.partial(_gathered, precision=precision),
        )  # fmt: skip
        return jax.tree.map(lambda leaf: leaf[:, None], result), (True, True)

    whole = (memory.keys_CxKxMxE, memory.values_CxKxMxE, memory.ids_CxM, memory.positions_CxM)
    result: Results = one(queries, memory.until_BxN, entry, *whole)
    return result


def _seen(
    queries: Queries, until_RxN: jax.Array, entry_R: jax.Array, whole: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The entry that each row reads, 0 for none, and bool RxNxM."""
    keys, values, ids, positions = whole
    entry_R = jnp.maximum(entry_R, 0)
    return entry_R, seen(queries, Memory(keys, values, ids[entry_R], positions[entry_R], until_RxN))


def _gathered(
    queries: Queries, until_RxN: jax.Array, entry_R: jax.Array, whole: Sequence[jax.Array], precision: Any
) -> Results:
    """All rows at once, of copies of their entries."""
    entry_R, seen_RxNxM = _seen(queries, until_RxN, entry_R, whole)
    return over_seen(queries.query_BxKxGxNxE, [(whole[0][entry_R], whole[1][entry_R], seen_RxNxM)], precision)


def _on_tpu(
    queries: Queries, until_RxN: jax.Array, entry_R: jax.Array, whole: Sequence[jax.Array], precision: Any
) -> Results:
    """With slices of the memory: those of all rows together if they are small, else row after row."""
    if sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in whole[:2]) > FEW_BYTES:
        return _in_turn(queries, until_RxN, entry_R, whole, precision)
    entry_R, seen_RxNxM = _seen(queries, until_RxN, entry_R, whole)
    # Slices leave the memory in its layout; a gather may want another, and copy all of it.
    keys, values = (
        jnp.concatenate([jax.lax.dynamic_slice_in_dim(leaf, entry_R[i], 1) for i in range(len(entry_R))])
        for leaf in whole[:2]
    )
    return over_seen(queries.query_BxKxGxNxE, [(keys, values, seen_RxNxM)], precision, FEWEST_ON_TPUS)


def _in_turn(
    queries: Queries, until_RxN: jax.Array, entry_R: jax.Array, whole: Sequence[jax.Array], precision: Any
) -> Results:
    """Row after row, each with a slice."""
    query = queries.query_BxKxGxNxE
    count = jnp.max(jnp.where(entry_R >= 0, jnp.arange(1, len(entry_R) + 1, dtype=jnp.int32), 0))
    entry_R, seen_RxNxM = _seen(queries, until_RxN, entry_R, whole)

    def row(i: jax.Array, results: Results) -> Results:
        own_query, own_seen = (jax.lax.dynamic_slice_in_dim(leaf, i, 1) for leaf in (query, seen_RxNxM))
        keys, values = (jax.lax.dynamic_slice_in_dim(leaf, entry_R[i], 1) for leaf in whole[:2])
        new = over_seen(own_query, [(keys, values, own_seen)], precision, FEWEST_ON_TPUS)
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, i, 0)  # noqa: E731
        return write(results[0], new[0]), write(results[1], new[1])

    nothing = jnp.zeros(query.shape, jnp.float32), jnp.full(query.shape[:-1], HIDDEN, jnp.float32)
    return jax.lax.fori_loop(0, count, row, nothing)

"""Attention with all scores of some queries at once, and its gradient, from a log-sum-exp: plain products.

What `mod_star.model.attention_primitive` computes, written as one reads it. It is used where the scores are few, and
query block by query block where a mesh or an accelerator wants plain products.

Axes: B rows of a batch, K key heads, G queries per key head, N queries, M keys, E width of a head. A memory's leading
axis is C, with B a multiple of C: B // C rows, one after the other, share one entry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

HIDDEN = -1e30
"""Score of a key that a query doesn't see."""
TINY = 1e-30
AT_ONCE = 2**18
"""Scores per row and head that may exist at one time: so many queries times all keys."""
QUERY_BLOCK = 128
FEW_KEYS = 128
"""Of fewer keys a product need not be filled up: it is little work in any form."""


@struct.dataclass
class Queries:
    """Queries, scaled and rotated, and what decides which keys they see."""

    query_BxKxGxNxE: jax.Array
    ids_BxN: jax.Array
    """int32 document of each."""
    after_BxN: jax.Array
    """int32; keys at this position and before are out of the window."""


@struct.dataclass
class Memory:
    """Keys and values. A query sees a key iff their documents are equal and after < the key's position <= until."""

    keys_CxKxMxE: jax.Array
    values_CxKxMxE: jax.Array
    ids_CxM: jax.Array
    """int32 document of each; negative: nobody sees it."""
    positions_CxM: jax.Array
    """int32."""
    until_BxN: jax.Array
    """int32, the last position that each query sees of this memory."""


def seen(queries: Queries, memory: Memory) -> jax.Array:
    """Bool BxNxM."""
    share = queries.ids_BxN.shape[0] // memory.ids_CxM.shape[0]
    ids, positions = (jnp.repeat(a, share, 0) if share > 1 else a for a in (memory.ids_CxM, memory.positions_CxM))
    return sees((queries.ids_BxN, queries.after_BxN, memory.until_BxN), (ids, positions))


def sees(queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...]) -> jax.Array:
    """Bool [..., N, M], `rule` for each pair: queries (ids, after, until) [..., N], keys (ids, positions) [..., M]."""
    return rule([leaf[..., None] for leaf in queries], [leaf[..., None, :] for leaf in keys])


def rule(queries: Sequence[jax.Array], keys: Sequence[jax.Array]) -> jax.Array:
    """Bool: whether queries (ids, after, until) see keys (ids, positions), whose shapes broadcast."""
    ids, after, until = queries
    key_ids, positions = keys
    return (ids == key_ids) & (positions <= until) & (positions > after)


class Products:
    """The products of attention between queries and one memory, whose C entries several rows may share.

    A product has at least `fewest` rows; rows of zeros fill it up.
    """

    def __init__(self, query_BxKxGxNxE: jax.Array, C: int, precision: Any, fewest: int = 1) -> None:
        B, K, G, N, _ = query_BxKxGxNxE.shape
        self._C = C
        self._shape, self._share = (B, K, G, N), B // self._C
        self._rows_of_product = self._share * G * N
        self._added = max(0, fewest - self._rows_of_product)
        self._product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
        self._dtype = query_BxKxGxNxE.dtype

    def _rows(self, x: jax.Array) -> jax.Array:
        """BxKxGxNxX as CxKxRxX: XLA:CPU has 16-bit products of three axes, but not of more."""
        _, K, G, N = self._shape
        rows = jnp.swapaxes(x.astype(self._dtype).reshape(self._C, self._share, K, G * N, -1), 1, 2)
        rows = rows.reshape(self._C, K, self._rows_of_product, x.shape[-1])
        return jnp.pad(rows, ((0, 0), (0, 0), (0, self._added), (0, 0))) if self._added else rows

    def _back(self, rows_CxKxRxX: jax.Array) -> jax.Array:
        _, K, G, N = self._shape
        rows_CxKxRxX = jax.lax.slice_in_dim(rows_CxKxRxX, 0, self._rows_of_product, axis=2)
        rows = jnp.swapaxes(rows_CxKxRxX.reshape(self._C, K, self._share, G * N, -1), 1, 2)
        return rows.reshape(*self._shape, rows_CxKxRxX.shape[-1])

    def with_keys(self, x_BxKxGxNxE: jax.Array, keys_CxKxMxE: jax.Array) -> jax.Array:
        """Float32 BxKxGxNxM: each query's product with each key (or value)."""
        return self._back(self._product("ckre,ckme->ckrm", self._rows(x_BxKxGxNxE), keys_CxKxMxE))

    def weighted(self, weights_BxKxGxNxM: jax.Array, values_CxKxMxE: jax.Array) -> jax.Array:
        """Float32 BxKxGxNxE: the sum of values (or keys), weighted."""
        return self._back(self._product("ckrm,ckme->ckre", self._rows(weights_BxKxGxNxM), values_CxKxMxE))

    def gathered(self, weights_BxKxGxNxM: jax.Array, x_BxKxGxNxE: jax.Array) -> jax.Array:
        """Float32 CxKxMxE: the sum of what queries hold, weighted, over all queries that share a key."""
        return self._product("ckrm,ckre->ckme", self._rows(weights_BxKxGxNxM), self._rows(x_BxKxGxNxE))


def forward(
    queries: Queries, memories: Sequence[Memory], precision: Any, fewest: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the union of the memories.

    Args:
      queries: at least one row.
      memories: at least one.
      precision: of products of float32 operands.
      fewest: rows of a product, see `Products`.

    Returns:
      Float32 BxKxGxNxE, and float32 log-sum-exp of the scores BxKxGxN.
    """
    parts = [(memory.keys_CxKxMxE, memory.values_CxKxMxE, seen(queries, memory)) for memory in memories]
    return over_seen(queries.query_BxKxGxNxE, parts, precision, fewest)


def over_seen(
    query_BxKxGxNxE: jax.Array,
    parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    precision: Any,
    fewest: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """`forward`, where it is known who sees what.

    Args:
      query_BxKxGxNxE: scaled and rotated.
      parts: of each memory the keys and values CxKxMxE, and bool BxNxM, which queries see which keys.
      precision: as for `forward`.
      fewest: as for `forward`.
    """
    products = [
        Products(query_BxKxGxNxE, keys.shape[0], precision, fewest if keys.shape[2] >= FEW_KEYS else 1)
        for keys, _, _ in parts
    ]
    scores = [
        jnp.where(seen_BxNxM[:, None, None], product.with_keys(query_BxKxGxNxE, keys), HIDDEN)
        for product, (keys, _, seen_BxNxM) in zip(products, parts, strict=True)
    ]
    highest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [s.max(-1, keepdims=True) for s in scores]))
    weights = [jnp.exp(score - highest) for score in scores]
    total = functools.reduce(jnp.add, [weight.sum(-1, keepdims=True) for weight in weights])
    mixed = functools.reduce(
        jnp.add,
        [
            product.weighted(weight, values)
            for product, weight, (_, values, _) in zip(products, weights, parts, strict=True)
        ],
    )
    return mixed / total, (highest + jnp.log(total))[..., 0]


def union(pieces: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over several memories from those over each: weighted by their shares of the sum."""
    highest = functools.reduce(jnp.maximum, [log_sum for _, log_sum in pieces])
    shares = [jnp.exp(log_sum - highest) for _, log_sum in pieces]
    total = functools.reduce(jnp.add, shares)
    weighted = [share[..., None] * result for share, (result, _) in zip(shares, pieces, strict=True)]
    return functools.reduce(jnp.add, weighted) / total[..., None], highest + jnp.log(total)


def gradient(
    queries: Queries, memory: Memory, precision: Any, log_sum: jax.Array, delta: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What one memory adds to the gradient.

    Args:
      queries: of attention.
      memory: one of those that were attended to.
      precision: of products.
      log_sum: float32 BxKxGxN, log-sum-exp over all memories.
      delta: float32 BxKxGxN: the result times its gradient, summed over E, less the gradient of the log-sum-exp.
      grad: BxKxGxNxE, gradient of the result.

    Returns:
      Float32 gradients of queries BxKxGxNxE, and of the memory's keys and values CxKxMxE.
    """
    query = queries.query_BxKxGxNxE
    product = Products(query, memory.keys_CxKxMxE.shape[0], precision)
    scores = product.with_keys(query, memory.keys_CxKxMxE)
    weights = jnp.where(seen(queries, memory)[:, None, None], jnp.exp(scores - log_sum[..., None]), 0.0)
    of_scores = weights * (product.with_keys(grad, memory.values_CxKxMxE) - delta[..., None])
    of_values = product.gathered(weights, grad)
    return product.weighted(of_scores, memory.keys_CxKxMxE), product.gathered(of_scores, query), of_values


def forward_in_turn(
    queries: Queries, memories: Sequence[Memory], precision: Any, fewest: int = 1
) -> tuple[jax.Array, jax.Array]:
    """`forward`, some queries after the others where the scores of all would be many."""
    block = _queries_at_once(queries, memories)
    if block is None:
        return forward(queries, memories, precision, fewest)
    cut, join = _cutting(queries, block)

    def one(part: tuple[Queries, list[jax.Array]]) -> tuple[jax.Array, jax.Array]:
        own, limits = part
        cut_off = [replace(memory, until_BxN=until) for memory, until in zip(memories, limits, strict=True)]
        return forward(own, cut_off, precision)

    result: tuple[jax.Array, jax.Array] = join(
        jax.lax.map(one, cut((queries, [memory.until_BxN for memory in memories])))
    )
    return result


def gradient_in_turn(
    queries: Queries, memory: Memory, precision: Any, log_sum: jax.Array, delta: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`gradient`, some queries after the others where the scores of all would be many."""
    block = _queries_at_once(queries, [memory])
    if block is None:
        return gradient(queries, memory, precision, log_sum, delta, grad)
    cut, join = _cutting(queries, block)
    empty = jnp.zeros(memory.keys_CxKxMxE.shape, jnp.float32)

    def add(sums: tuple[jax.Array, jax.Array], part: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        own, until, *arrays = part
        of_queries, *more = gradient(own, replace(memory, until_BxN=until), precision, *arrays)
        return (sums[0] + more[0], sums[1] + more[1]), of_queries

    (of_keys, of_values), of_queries = jax.lax.scan(
        add, (empty, empty), cut((queries, memory.until_BxN, log_sum, delta, grad))
    )
    return join(of_queries), of_keys, of_values


def _queries_at_once(queries: Queries, memories: Sequence[Memory]) -> int | None:
    """Queries of a block; None: all at once."""
    N, M = queries.ids_BxN.shape[1], sum(memory.ids_CxM.shape[1] for memory in memories)
    return None if N <= QUERY_BLOCK or N * M <= AT_ONCE else QUERY_BLOCK


def _cutting(queries: Queries, block: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Two functions: one cuts arrays along their N into blocks (leading axis), the other joins them again."""
    N = queries.ids_BxN.shape[1]
    axis = lambda leaf: 1 if leaf.ndim == 2 else 3  # noqa: E731

    def cut(leaf: jax.Array) -> jax.Array:
        at = axis(leaf)
        # Queries that only fill up the last block see nothing: no key has their document.
        fill = -2 if leaf.dtype == jnp.int32 else 0
        padded = jnp.pad(leaf, [(0, -N % block if i == at else 0) for i in range(leaf.ndim)], constant_values=fill)
        return jnp.moveaxis(padded.reshape(*leaf.shape[:at], -1, block, *leaf.shape[at + 1 :]), at, 0)

    def join(leaf: jax.Array) -> jax.Array:
        at = 3
        joined = jnp.moveaxis(leaf, 0, at)
        joined = joined.reshape(*joined.shape[:at], -1, *joined.shape[at + 2 :])
        return jax.lax.slice_in_dim(joined, 0, N, axis=at)

    return functools.partial(jax.tree.map, cut), functools.partial(jax.tree.map, join)

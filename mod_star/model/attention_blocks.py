"""Attention on a CPU: blocks of queries against blocks of keys, whose scores never leave the cache.

A block of scores is 128 x 128 for two heads. Products of that size keep little more than one core busy, see
docs/results/speed_training.md; larger blocks would compute more scores that nobody sees. Memory grows with the number
of tokens, not with its square. Blocks that no query can see are skipped: a block knows the first and last (document,
position) in it, so that causal attention computes half the scores, and packed documents or a sliding window fewer
still. Softmax is summed up block by block (Milakov and Gimelshein 2018; Dao et al. 2022). The gradient computes the
scores again, with the block of keys in the outer loop: as k·q', so that none of the three products that follow needs
turned scores. The one for the queries has keys turned once for all blocks of queries.

Axes: as in `attention_whole`; L key heads of all rows, P of them at a time, I blocks of queries, J blocks of keys.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.model.attention_whole import HIDDEN, TINY, Memory, Queries, sees

BLOCK = 128
"""Queries (all of a key head's) and keys of a block."""
HEADS = 2
"""Key heads that are computed side by side."""
FEWEST = 16
"""Queries of one head in a block, at least, however many heads share a key head."""


@struct.dataclass
class _Blocks:
    """A problem cut into blocks; the leading axes are L / P steps of P key heads."""

    query: jax.Array
    """[L/P, I, P, G·n, E]"""
    keys: jax.Array
    """[L/P, J, P, m, E]"""
    values: jax.Array
    query_ids: jax.Array
    """int32 [L/P, I, P, n], as `after` and `until`."""
    after: jax.Array
    until: jax.Array
    key_ids: jax.Array
    """int32 [L/P, J, P, m], as `positions`."""
    positions: jax.Array
    visible: jax.Array
    """bool [L/P, I, J]: whether a query of a block may see a key of a block."""


def is_large(queries: Queries, memory: Memory) -> bool:
    """Whether blocks pay: there is more than one of queries and one of keys."""
    B, _, G, N, _ = queries.query_BxKxGxNxE.shape
    C, M = memory.ids_CxM.shape
    return N * (B // C) * G > BLOCK and M > BLOCK


def forward(queries: Queries, memory: Memory, precision: Any, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """As `attention_whole.forward`, of one memory, in `dtype`; one that sees nothing has a log-sum near `HIDDEN`."""
    cut = _cut(queries, memory)
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    def heads(part: _Blocks) -> tuple[jax.Array, jax.Array]:
        def queries_block(own: Any) -> tuple[jax.Array, jax.Array]:
            query, where, visible_J = own
            P, rows, E = query.shape

            def add(j: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
                highest, total, mixed = sums
                score = product("pne,pme->pnm", query, part.keys[j])
                score = jnp.where(_seen(where, (part.key_ids[j], part.positions[j]), rows), score, HIDDEN)
                higher = jnp.maximum(highest, score.max(-1))
                weight, fade = jnp.exp(score - higher[..., None]), jnp.exp(highest - higher)
                new = product("pnm,pme->pne", weight.astype(query.dtype), part.values[j])
                return higher, total * fade + weight.sum(-1), mixed * fade[..., None] + new

            zeros = jnp.zeros((P, rows), jnp.float32)
            start = (zeros + HIDDEN, zeros, jnp.zeros((P, rows, E), jnp.float32))
            highest, total, mixed = jax.lax.fori_loop(*_span(visible_J), add, start)
            total = jnp.maximum(total, TINY)
            return mixed / total[..., None], highest + jnp.log(total)

        return jax.lax.map(queries_block, (part.query, (part.query_ids, part.after, part.until), part.visible))

    mixed, log_sum = jax.lax.map(heads, cut)
    return _joined(mixed, queries, memory).astype(dtype), _joined(log_sum[..., None], queries, memory)[..., 0]


def gradient(
    queries: Queries,
    memory: Memory,
    precision: Any,
    log_sum: jax.Array,
    delta: jax.Array,
    grad: jax.Array,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `attention_whole.gradient`; of the queries in `dtype`."""
    cut = _cut(queries, memory)
    rows = functools.partial(_rows, queries=queries, memory=memory)
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    dtype = queries.query_BxKxGxNxE.dtype

    def heads(part: tuple[_Blocks, jax.Array, jax.Array, jax.Array]) -> Any:
        own, log_sums, deltas, grads = part

        def keys_block(of_queries: jax.Array, block: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            keys, values, where, visible_I = block

            def add(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                of_keys, of_values, of_queries = sums
                query, grad = own.query[i], grads[i]
                of_block = (own.query_ids[i], own.after[i], own.until[i])
                seen = jnp.swapaxes(_seen(of_block, where, query.shape[1]), 1, 2)
                score = product("pme,pne->pmn", keys, query)
                weight = jnp.where(seen, jnp.exp(score - log_sums[i][:, None]), 0.0)
                of_score = weight * (product("pme,pne->pmn", values, grad) - deltas[i][:, None])
                of_score = of_score.astype(dtype)
                of_values += product("pmn,pne->pme", weight.astype(dtype), grad)
                of_keys += product("pmn,pne->pme", of_score, query)
                return of_keys, of_values, of_queries.at[i].add(product("pem,pmn->pen", turned_keys, of_score))

            turned_keys, zeros = jnp.swapaxes(keys, 1, 2), jnp.zeros(keys.shape, jnp.float32)
            of_keys, of_values, of_queries = jax.lax.fori_loop(*_span(visible_I), add, (zeros, zeros, of_queries))
            return of_queries, (of_keys, of_values)

        blocks = (own.keys, own.values, (own.key_ids, own.positions), own.visible.T)
        turned_zeros = jnp.zeros(jnp.swapaxes(own.query, 2, 3).shape, jnp.float32)
        of_queries, of_memory = jax.lax.scan(keys_block, turned_zeros, blocks)
        return jnp.swapaxes(of_queries, 2, 3), *of_memory

    arrays = rows(log_sum[..., None])[..., 0], rows(delta[..., None])[..., 0], rows(grad.astype(dtype))
    of_queries, *of_memory = jax.lax.map(heads, (cut, *arrays))
    C, K, M, _ = memory.keys_CxKxMxE.shape
    of_keys, of_values = (jnp.swapaxes(leaf, 1, 2).reshape(C, K, -1, leaf.shape[-1])[:, :, :M] for leaf in of_memory)
    return _joined(of_queries, queries, memory).astype(dtype), of_keys, of_values


def _seen(queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...], rows: int) -> jax.Array:
    """Bool P x rows x m: `sees` of one block, the same for all queries of a key head."""
    seen = sees(queries, keys)
    return jnp.tile(seen, (1, rows // seen.shape[1], 1))


def _span(visible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first block that may be seen, and the one after the last; both 0 if there is none."""
    count = visible.shape[0]
    numbers = jnp.arange(count, dtype=jnp.int32)
    end = jnp.max(jnp.where(visible, numbers + 1, 0))
    return jnp.minimum(jnp.min(jnp.where(visible, numbers, count)), end), end


def _sizes(queries: Queries, memory: Memory) -> tuple[int, int, int]:
    """Queries n of a block (of one head), keys m of a block, key heads P at a time."""
    B, K, G, N, _ = queries.query_BxKxGxNxE.shape
    C, M = memory.ids_CxM.shape
    return _even(N * (B // C), max(FEWEST, BLOCK // G)), _even(M, BLOCK), HEADS if C * K % HEADS == 0 else 1


def _even(count: int, most: int) -> int:
    """The size of blocks of at most `most`, as many as it takes, that are about equally large."""
    return min(most, 8 * math.ceil(math.ceil(count / math.ceil(count / most)) / 8))


def _rows(x_BxKxGxNxX: jax.Array, queries: Queries, memory: Memory) -> jax.Array:
    """Anything that queries have, cut: [L/P, I, P, G·n, X]."""
    B, K, G, N, _ = queries.query_BxKxGxNxE.shape
    C = memory.ids_CxM.shape[0]
    n, _, P = _sizes(queries, memory)
    x = x_BxKxGxNxX.reshape(C, B // C, K, G, N, -1)
    x = x.transpose(0, 2, 3, 1, 4, 5).reshape(C * K, G, B // C * N, -1)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % n), (0, 0)))
    x = x.reshape(-1, P, G, x.shape[2] // n, n, x.shape[3]).transpose(0, 3, 1, 2, 4, 5)
    return x.reshape(*x.shape[:3], G * n, x.shape[-1])


def _joined(x: jax.Array, queries: Queries, memory: Memory) -> jax.Array:
    """The reverse of `_rows`: BxKxGxNxX."""
    B, K, G, N, _ = queries.query_BxKxGxNxE.shape
    C = memory.ids_CxM.shape[0]
    steps, I, P, rows, X = x.shape  # noqa: E741
    x = x.reshape(steps, I, P, G, rows // G, X).transpose(0, 2, 3, 1, 4, 5)
    x = x.reshape(C, K, G, -1, X)[:, :, :, : B // C * N].reshape(C, K, G, B // C, N, X)
    return x.transpose(0, 3, 1, 2, 4, 5).reshape(B, K, G, N, X)


def _cut(queries: Queries, memory: Memory) -> _Blocks:
    K, (C, M) = queries.query_BxKxGxNxE.shape[1], memory.ids_CxM.shape
    n, m, P = _sizes(queries, memory)

    def of_queries(values_BxN: jax.Array, fill: int) -> jax.Array:
        values = values_BxN.reshape(C, -1)
        values = jnp.pad(values, ((0, 0), (0, -values.shape[1] % n)), constant_values=fill)
        return values.reshape(C, -1, n)

    def of_keys(values_CxM: jax.Array, fill: int) -> jax.Array:
        return jnp.pad(values_CxM, ((0, 0), (0, -M % m)), constant_values=fill).reshape(C, -1, m)

    def heads(values: jax.Array) -> jax.Array:
        """[C, blocks, size] as [L/P, blocks, P, size]."""
        each = jnp.repeat(values, K, 0).reshape(-1, P, *values.shape[1:])
        return jnp.swapaxes(each, 1, 2)

    def content(leaf_CxKxMxE: jax.Array) -> jax.Array:
        padded = jnp.pad(leaf_CxKxMxE, ((0, 0), (0, 0), (0, -M % m), (0, 0)))
        return jnp.swapaxes(padded.reshape(-1, P, padded.shape[2] // m, m, padded.shape[3]), 1, 2)

    ids, after, until = (
        of_queries(queries.ids_BxN, -2),
        of_queries(queries.after_BxN, 0),
        of_queries(memory.until_BxN, 0),
    )
    key_ids, positions = of_keys(memory.ids_CxM, -1), of_keys(memory.positions_CxM, 0)
    visible_CxIxJ = visible(ids, after, until, key_ids, positions)
    any_head = jnp.any(jnp.repeat(visible_CxIxJ, K, 0).reshape(-1, P, *visible_CxIxJ.shape[1:]), 1)
    return _Blocks(
        _rows(queries.query_BxKxGxNxE, queries, memory), content(memory.keys_CxKxMxE), content(memory.values_CxKxMxE),
        heads(ids), heads(after), heads(until), heads(key_ids), heads(positions), any_head,
    )  # fmt: skip


def visible(ids: jax.Array, after: jax.Array, until: jax.Array, key_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """Bool CxIxJ: whether a query of block i may see a key of block j, judged by the ends of both.

    Pairs (document, position) are compared by document first. A key that is seen stands in the query's document, not
    after the last position that the query sees and not before the first. So the block's first key doesn't come after
    the last pair that any query sees, and the block's last key doesn't come before the first.
    """
    last_query, first_query = _last(ids, until), _first(ids, after)
    first_key, last_key = _first(key_ids, positions), _last(key_ids, positions)
    early = _not_after(*(x[:, None] for x in first_key), *(x[..., None] for x in last_query))
    return early & _not_after(*(x[..., None] for x in first_query), *(x[:, None] for x in last_key))


_NOBODY = 2**31 - 1


def _first(ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest (document, position) of each block; documents below 0 are nobody's."""
    ids = jnp.where(ids < 0, _NOBODY, ids)
    smallest = ids.min(-1)
    return smallest, jnp.where(ids == smallest[..., None], positions, _NOBODY).min(-1)


def _last(ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The greatest (document, position) of each block."""
    greatest = ids.max(-1)
    return greatest, jnp.where(ids == greatest[..., None], positions, -_NOBODY).max(-1)


def _not_after(id_a: jax.Array, a: jax.Array, id_b: jax.Array, b: jax.Array) -> jax.Array:
    return (id_a < id_b) | ((id_a == id_b) & (a <= b))

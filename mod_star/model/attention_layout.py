"""Queries and a memory as kernels take them: filled up to whole blocks, and which blocks see which.

`mod_star.model.attention_kernel` for TPUs and `mod_star.model.attention_triton` for GPUs share it.

Axes: as in `attention_whole`; H = K x G heads of queries; R queries of all rows that share keys; I blocks of n queries,
J blocks of m keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.model.attention_blocks import visible
from mod_star.model.attention_whole import Memory, Queries

SOME, ALL = 1, 2
"""How many of a block's keys a block's queries see; 0: none."""


@dataclass(frozen=True)
class Problem:
    """Queries and a memory, filled up to whole blocks, and how a kernel computes with them."""

    query: jax.Array
    """[C, H, R, E]"""
    keys: jax.Array
    """[C, K, M, E]"""
    values: jax.Array
    of_queries: jax.Array
    """int32 [C, 3, R]: ids, after, until."""
    of_keys: jax.Array
    """int32 [C, 2, M]: ids, positions."""
    n: int
    m: int
    precision: Any
    """Of products, as a kernel asks for it."""
    interpret: bool
    """Whether the kernel is computed without its platform, in jax.numpy; for tests."""

    @property
    def blocks(self) -> tuple[int, int]:
        """I and J."""
        return self.query.shape[2] // self.n, self.keys.shape[2] // self.m

    @property
    def group(self) -> int:
        """G."""
        return self.query.shape[1] // self.keys.shape[1]

    @property
    def product_flops(self) -> float:
        """Operations of one product of all queries with all keys."""
        return 2.0 * self.query.size * self.keys.shape[2]


def lay_out(
    queries: Queries, memory: Memory, blocks: tuple[int, int], precision: Any, interpret: bool = False
) -> Problem:
    """Fills up to blocks of n queries and m keys. What is added sees nothing, and nothing sees it."""
    (n, m), (C, M) = blocks, memory.ids_CxM.shape
    fill = ((0, 0), (0, 0), (0, -M % m), (0, 0))

    def padded(rows: tuple[jax.Array, ...], size: int, fills: tuple[int, ...]) -> jax.Array:
        flat = [row.astype(jnp.int32).reshape(C, -1) for row in rows]
        filled = [
            jnp.pad(row, ((0, 0), (0, -row.shape[1] % size)), constant_values=value)
            for row, value in zip(flat, fills, strict=True)
        ]
        return jnp.stack(filled, 1)

    own = (queries.ids_BxN, queries.after_BxN, memory.until_BxN)
    return Problem(
        query=queries_first(queries.query_BxKxGxNxE, queries, memory, n),
        keys=jnp.pad(memory.keys_CxKxMxE, fill),
        values=jnp.pad(memory.values_CxKxMxE, fill),
        of_queries=padded(own, n, (-2, 0, 0)),
        of_keys=padded((memory.ids_CxM, memory.positions_CxM), m, (-1, 0)),
        n=n,
        m=m,
        precision=precision,
        interpret=interpret,
    )


def queries_first(x_BxKxGxNxX: jax.Array, queries: Queries, memory: Memory, n: int) -> jax.Array:
    """Anything that queries have, [C, H, R, X], filled up to blocks of n."""
    B, K, G, N, _ = queries.query_BxKxGxNxE.shape
    C = memory.ids_CxM.shape[0]
    x = x_BxKxGxNxX.reshape(C, B // C, K * G, N, -1)
    x = jnp.swapaxes(x, 1, 2).reshape(C, K * G, B // C * N, -1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % n), (0, 0)))


def rows_first(x: jax.Array, queries: Queries, memory: Memory) -> jax.Array:
    """The reverse of `queries_first`."""
    B, K, G, N, _ = queries.query_BxKxGxNxE.shape
    C = memory.ids_CxM.shape[0]
    x = x[:, :, : B // C * N].reshape(C, K * G, B // C, N, -1)
    return jnp.swapaxes(x, 1, 2).reshape(B, K, G, N, -1)


def kinds(problem: Problem) -> jax.Array:
    """Int32 [C, I, J]: 0, `SOME` or `ALL`. Judged by the ends of blocks: 0 and `ALL` are sure, `SOME` may be none."""
    (I, J), C = problem.blocks, problem.of_keys.shape[0]  # noqa: E741
    ids, after, until = (problem.of_queries[:, row].reshape(C, I, -1) for row in range(3))
    key_ids, positions = (problem.of_keys[:, row].reshape(C, J, -1) for row in range(2))
    some = visible(ids, after, until, key_ids, positions)
    low, high, key_low, key_high = ids.min(-1), ids.max(-1), key_ids.min(-1), key_ids.max(-1)
    one = (low == high)[:, :, None] & (key_low == key_high)[:, None] & (low[:, :, None] == key_low[:, None])
    inside = positions.max(-1)[:, None] <= until.min(-1)[:, :, None]
    inside &= positions.min(-1)[:, None] > after.max(-1)[:, :, None]
    return jnp.where(some, jnp.where(one & inside, ALL, SOME), 0)

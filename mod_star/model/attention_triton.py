"""Attention on an NVIDIA GPU: Pallas kernels that Triton compiles, whose blocks of scores never leave a processor.

As in `mod_star.model.attention_blocks`, a block of queries meets a block of keys at a time, and softmax is summed up
block by block (Milakov and Gimelshein 2018; Dao et al. 2022). The gradient computes the scores again from the
log-sum-exp, in two kernels: one sums over keys for each block of queries, the other over queries for each block of
keys. Each sum is a loop inside one program of the grid. It goes from the first block that is seen to the last. In
between, where all see all, no mask is computed. These bounds are computed beforehand, and read by the program.

Sums and softmax are float32. Products take operands of the queries' type: 16-bit ones as they are; float32 ones exactly
where precision asks for the highest, else rounded to TF32.

Block sizes go by the bytes of one row of E numbers, a power of 2 (E is filled up to one). A program keeps its own rows
in shared memory, and those of `STAGES` blocks of the others, which are copied ahead of their use. Of 16-bit numbers:
    forward     n query rows; m rows of each keys and values, per stage
    gradient    n rows of each queries and gradients against m of each keys and values, or the reverse
    row bytes               32..128     256         512         1,024
    forward n, m            128, 64     128, 64     64, 32      32, 16
      KiB, at most          48          96          96          96
    gradient n = m          64          64          32          16
      KiB, at most          48          96          96          96
Of float32 numbers blocks are half as large: their products keep more in registers. A program may have 99 KiB (compute
capability 8.6, 8.9), 163 KiB (8.0) or 227 KiB (9.0). Compiled for 8.6 by XLA, all these sizes fit, and at most 56 bytes
of a thread's registers are spilled. Compute capability 8.0 is the least: before, there are no products of bfloat16.

Axes: as in `attention_layout`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mod_star.model.attention_layout import ALL, Problem, kinds, lay_out, queries_first, rows_first
from mod_star.model.attention_whole import HIDDEN, TINY, Memory, Queries, rule

FEWEST = 128
"""Queries and keys that a kernel pays for."""
LEAST = 16
"""Rows and columns of a product, at least."""
WIDEST = 1024
"""Bytes of a row, at most: beyond, blocks of `LEAST` rows have no room in shared memory."""
STAGES = 2


def is_large(queries: Queries, memory: Memory) -> bool:
    """Whether a kernel pays, and has room for one head's row."""
    C, M = memory.ids_CxM.shape
    return queries.ids_BxN.size // C >= FEWEST and M >= FEWEST and _row_bytes(queries) <= WIDEST


def forward(
    queries: Queries, memory: Memory, precision: Any, dtype: Any = jnp.float32, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `attention_whole.forward`, of one memory; a query that sees nothing has a log-sum-exp near `HIDDEN`.

    Args:
      queries: to attend with.
      memory: to attend to.
      precision: of products of float32 operands.
      dtype: of the result.
      interpret: compute it without a GPU, in jax.numpy; for tests.
    """
    problem = _problem(queries, memory, _blocks(queries), precision, interpret)
    outputs = {"query": dtype, "row": jnp.float32}
    mixed, log_sum = _over_keys(_forward_kernel, problem, (), outputs)
    log_sum = rows_first(log_sum[..., None], queries, memory)[..., 0]
    return rows_first(mixed, queries, memory)[..., : queries.query_BxKxGxNxE.shape[-1]], log_sum


def gradient(
    queries: Queries,
    memory: Memory,
    precision: Any,
    log_sum: jax.Array,
    delta: jax.Array,
    grad: jax.Array,
    dtype: Any = jnp.float32,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `attention_whole.gradient`: of the queries in `dtype`, of keys and values in their own type."""
    (M, E), size = memory.keys_CxKxMxE.shape[2:], _gradient_block(queries)
    problem = _problem(queries, memory, (size, size), precision, interpret)
    more = (
        *(queries_first(leaf[..., None], queries, memory, size)[..., 0] for leaf in (log_sum, delta)),
        queries_first(_widened(grad.astype(problem.query.dtype)), queries, memory, size),
    )
    (of_queries,) = _over_keys(_query_gradient_kernel, problem, more, {"query": dtype})
    of_keys, of_values = _over_queries(_key_gradient_kernel, problem, more)
    return rows_first(of_queries, queries, memory)[..., :E], of_keys[:, :, :M, :E], of_values[:, :, :M, :E]


# What is computed of a block of queries and a block of keys.


def _product(x: jax.Array, y: jax.Array, axes: tuple[int, int], precision: Any) -> jax.Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _seen(of_queries: Any, of_keys: Any, at: Any, queries_along: int) -> jax.Array:
    """Bool n x m, or m x n where `queries_along` is 1.

    Args:
      of_queries: reference [3, queries].
      of_keys: reference [2, keys].
      at: slices of queries and of keys.
      queries_along: the axis of queries.
    """
    own = [jnp.expand_dims(of_queries[row, at[0]], 1 - queries_along) for row in range(3)]
    others = [jnp.expand_dims(of_keys[row, at[1]], queries_along) for row in range(2)]
    return rule(own, others)


def _forward_kernel(problem: Problem, spans: Any, *refs: Any) -> None:
    of_queries, of_keys, query, keys, values, mixed, log_sum = refs
    own, (n, E) = query[...], query.shape

    def add(j: jax.Array, sums: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
        highest, total, mixed = sums
        block = pl.ds(j * problem.m, problem.m)
        score = _product(own, keys[block, :], (1, 1), problem.precision)
        if masked:
            score = jnp.where(_seen(of_queries, of_keys, (slice(None), block), 0), score, HIDDEN)
        higher = jnp.maximum(highest, score.max(1))
        weight, fade = jnp.exp(score - higher[:, None]), jnp.exp(highest - higher)
        new = _product(weight.astype(values.dtype), values[block, :], (1, 0), problem.precision)
        return higher, total * fade + weight.sum(1), mixed * fade[:, None] + new

    zeros = jnp.zeros(n, jnp.float32)
    highest, total, sums = _sum_up(spans, add, (zeros + HIDDEN, zeros, jnp.zeros((n, E), jnp.float32)))
    total = jnp.maximum(total, TINY)
    mixed[...] = (sums / total[:, None]).astype(mixed.dtype)
    log_sum[...] = highest + jnp.log(total)


def _query_gradient_kernel(problem: Problem, spans: Any, *refs: Any) -> None:
    of_queries, of_keys, query, keys, values, log_sum, delta, grad, of_query = refs
    own, own_grad, own_log_sum, own_delta = query[...], grad[...], log_sum[...][:, None], delta[...][:, None]

    def add(j: jax.Array, sums: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
        block = pl.ds(j * problem.m, problem.m)
        its_keys = keys[block, :]
        weight = jnp.exp(_product(own, its_keys, (1, 1), problem.precision) - own_log_sum)
        if masked:
            weight = jnp.where(_seen(of_queries, of_keys, (slice(None), block), 0), weight, 0.0)
        of_score = weight * (_product(own_grad, values[block, :], (1, 1), problem.precision) - own_delta)
        return (sums[0] + _product(of_score.astype(own.dtype), its_keys, (1, 0), problem.precision),)

    (sums,) = _sum_up(spans, add, (jnp.zeros(query.shape, jnp.float32),))
    of_query[...] = sums.astype(of_query.dtype)


def _key_gradient_kernel(problem: Problem, spans: Any, *refs: Any) -> None:
    of_queries, of_keys, query, keys, values, log_sum, delta, grad, of_key, of_value = refs
    own, own_values = keys[...], values[...]

    def add(i: jax.Array, sums: tuple[jax.Array, ...], masked: bool, head: jax.Array) -> tuple[jax.Array, ...]:
        block = pl.ds(i * problem.n, problem.n)
        its, its_grad = query[head, block, :], grad[head, block, :]
        weight = jnp.exp(_product(own, its, (1, 1), problem.precision) - log_sum[head, block][None])
        if masked:
            weight = jnp.where(_seen(of_queries, of_keys, (block, slice(None)), 1), weight, 0.0)
        of_score = weight * (_product(own_values, its_grad, (1, 1), problem.precision) - delta[head, block][None])
        return (
            sums[0] + _product(of_score.astype(its.dtype), its, (1, 0), problem.precision),
            sums[1] + _product(weight.astype(its.dtype), its_grad, (1, 0), problem.precision),
        )

    def add_head(head: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return _sum_up(spans, functools.partial(add, head=head), sums)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    of_key[...], of_value[...] = (
        sums.astype(of_key.dtype) for sums in jax.lax.fori_loop(0, problem.group, add_head, (zeros, zeros))
    )


def _sum_up(spans: Any, add: Callable[..., tuple[jax.Array, ...]], sums: tuple[jax.Array, ...]) -> Any:
    """Adds up what the blocks of a span give; `add` gets a block's number, the sums, and whether there is to mask."""
    first, from_, to, end = (spans[place] for place in range(4))
    for start, stop, masked in ((first, from_, True), (from_, to, False), (to, end, True)):
        sums = jax.lax.fori_loop(start, stop, functools.partial(add, masked=masked), sums)
    return sums


# How a kernel goes over the blocks.


def _over_keys(
    kernel: Callable[..., None], problem: Problem, more: Sequence[jax.Array], outputs: dict[str, Any]
) -> list[jax.Array]:
    """Runs a kernel that sums over keys, for each block of queries of each head.

    Args:
      kernel: from a problem and references to spans, operands and results.
      problem: its operands.
      more: log-sum-exp, delta and gradient, where the kernel is of the gradient.
      outputs: types of its results: of one that has as much as the queries, and of one that has a number for each.
    """
    (C, H, R, E), (I, _), G = problem.query.shape, problem.blocks, problem.group  # noqa: E741
    n, M = problem.n, problem.keys.shape[2]
    specs = {
        "spans": pl.BlockSpec((None, None, 4), lambda i, h, c: (c, i, 0)),
        "of_queries": pl.BlockSpec((None, 3, n), lambda i, h, c: (c, 0, i)),
        "of_keys": pl.BlockSpec((None, 2, M), lambda i, h, c: (c, 0, 0)),
        "query": pl.BlockSpec((None, None, n, E), lambda i, h, c: (c, h, i, 0)),
        "keys": pl.BlockSpec((None, None, M, E), lambda i, h, c: (c, jax.lax.div(h, jnp.int32(G)), 0, 0)),
        "row": pl.BlockSpec((None, None, n), lambda i, h, c: (c, h, i)),
    }
    shapes = {"query": (C, H, R, E), "row": (C, H, R)}
    results = [(kind, jax.ShapeDtypeStruct(shapes[kind], dtype)) for kind, dtype in outputs.items()]
    return _call(kernel, problem, (I, H, C), (_spans(kinds(problem)), *more), specs, results)


def _over_queries(kernel: Callable[..., None], problem: Problem, more: Sequence[jax.Array]) -> list[jax.Array]:
    """Runs a kernel that sums over queries, of all heads that share keys, for each block of keys."""
    (C, K, _, E), (_, J), G = problem.keys.shape, problem.blocks, problem.group
    m, R = problem.m, problem.query.shape[2]
    specs = {
        "spans": pl.BlockSpec((None, None, 4), lambda j, k, c: (c, j, 0)),
        "of_queries": pl.BlockSpec((None, 3, R), lambda j, k, c: (c, 0, 0)),
        "of_keys": pl.BlockSpec((None, 2, m), lambda j, k, c: (c, 0, j)),
        "query": pl.BlockSpec((None, G, R, E), lambda j, k, c: (c, k, 0, 0)),
        "keys": pl.BlockSpec((None, None, m, E), lambda j, k, c: (c, k, j, 0)),
        "row": pl.BlockSpec((None, G, R), lambda j, k, c: (c, k, 0)),
    }
    results = [("keys", jax.ShapeDtypeStruct(a.shape, a.dtype)) for a in (problem.keys, problem.values)]
    spans = _spans(jnp.swapaxes(kinds(problem), 1, 2))
    return _call(kernel, problem, (J, K, C), (spans, *more), specs, results)


def _call(
    kernel: Callable[..., None],
    problem: Problem,
    grid: tuple[int, ...],
    arrays: tuple[jax.Array, ...],
    specs: dict[str, Any],
    results: list[tuple[str, jax.ShapeDtypeStruct]],
) -> list[jax.Array]:
    spans, *more = arrays
    operands = (spans, problem.of_queries, problem.of_keys, problem.query, problem.keys, problem.values, *more)
    names = ("spans", "of_queries", "of_keys", "query", "keys", "keys", "row", "row", "query")[: len(operands)]
    outputs: list[jax.Array] = pl.pallas_call(
        functools.partial(kernel, problem),
        grid=grid,
        in_specs=[specs[name] for name in names],
        out_specs=[specs[name] for name, _ in results],
        out_shape=[shape for _, shape in results],
        compiler_params=plgpu.CompilerParams(num_warps=_warps(problem), num_stages=STAGES),
        interpret=problem.interpret,
        name="attention" + kernel.__name__.removesuffix("_kernel"),
    )(*operands)
    return outputs


def _spans(kinds_CxIxJ: jax.Array) -> jax.Array:
    """Int32 [C, I, 4]: the first block of J that is seen, the first and the end of a run where all is, and the end.

    What lies between the first and the end, but not in the run, may be seen in part or not at all.
    """
    numbers = jnp.arange(kinds_CxIxJ.shape[2], dtype=jnp.int32)
    end = jnp.max(jnp.where(kinds_CxIxJ > 0, numbers + 1, 0), -1)
    least = lambda where, other: jnp.min(jnp.where(where, numbers, other[..., None]), -1)  # noqa: E731
    whole = kinds_CxIxJ == ALL
    from_ = least(whole, end)
    to = least(~whole & (numbers >= from_[..., None]), end)
    return jnp.stack([least(kinds_CxIxJ > 0, end), from_, to, end], -1)


# What the kernels are given.


def _row_bytes(queries: Queries) -> int:
    query = queries.query_BxKxGxNxE
    return _width(query.shape[-1]) * query.dtype.itemsize


def _blocks(queries: Queries) -> tuple[int, int]:
    """n and m of the forward pass. Products of float32 need room for what is multiplied: half as many."""
    row, size = _row_bytes(queries), queries.query_BxKxGxNxE.dtype.itemsize
    return min(256, 2**16 // row) // size, max(LEAST, min(128, 2**15 // row) // size)


def _gradient_block(queries: Queries) -> int:
    """n and m of the gradient."""
    return min(128 // queries.query_BxKxGxNxE.dtype.itemsize, 2**14 // _row_bytes(queries))


def _warps(problem: Problem) -> int:
    """Each has 32 threads, whose registers hold the sums."""
    return 8 if problem.query.shape[-1] >= 128 or problem.query.dtype.itemsize == 4 else 4


def _width(E: int) -> int:
    return max(LEAST, int(pl.next_power_of_2(E)))


def _widened(x: jax.Array) -> jax.Array:
    """Filled up along E with zeros, which change no product: Triton's arrays have a power of 2 of elements."""
    E = x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, _width(E) - E)])


def _problem(queries: Queries, memory: Memory, blocks: tuple[int, int], precision: Any, interpret: bool) -> Problem:
    """Precisions that Triton has: float32 and TF32."""
    queries = replace(queries, query_BxKxGxNxE=_widened(queries.query_BxKxGxNxE))
    wide = _widened(memory.keys_CxKxMxE), _widened(memory.values_CxKxMxE)
    memory = replace(memory, keys_CxKxMxE=wide[0], values_CxKxMxE=wide[1])
    exact = precision == jax.lax.Precision.HIGHEST
    products = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return lay_out(queries, memory, blocks, products, interpret)

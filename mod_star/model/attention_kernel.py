"""Attention on a TPU: Pallas kernels, whose blocks of scores never leave the chip's vector memory.

As in `mod_star.model.attention_blocks`, a block of queries meets a block of keys at a time, and softmax is summed up
block by block (Milakov and Gimelshein 2018; Dao et al. 2022). A table that is read before the kernel runs says of each
pair of blocks whether no query sees a key of it (then it is neither fetched nor computed), some do, or all see all
(then no mask is computed). The gradient is two kernels: one sums over keys for each block of queries, the other over
queries for each block of keys. Both compute the scores again from the log-sum-exp.

Scores are computed as k·q': queries lie along lanes, so that what a query has (its maximum, its log-sum-exp, the
positions it sees) is a row, and sums over keys are sums over sublanes.

Axes: as in `attention_layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mod_star.model.attention_layout import ALL, SOME, Problem, kinds, lay_out, queries_first, rows_first
from mod_star.model.attention_whole import HIDDEN, TINY, Memory, Queries, rule

LANES = 128
BLOCK = 512
"""Queries and keys of a block of 16-bit numbers, at most; a multiple of LANES."""
EXACT_BLOCK = 256
"""The same of float32, whose exact products are written out as six each: larger blocks take minutes to compile."""


def is_large(queries: Queries, memory: Memory) -> bool:
    """Whether a kernel pays: there is a block of queries and one of keys to fill."""
    C, M = memory.ids_CxM.shape
    return queries.ids_BxN.size // C >= LANES and M >= LANES


def forward(
    queries: Queries, memory: Memory, precision: Any, dtype: Any = jnp.float32, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `attention_whole.forward`, of one memory; a query that sees nothing has a log-sum-exp near `HIDDEN`.

    Args:
      queries: to attend with.
      memory: to attend to.
      precision: of products of float32 operands.
      dtype: of the result.
      interpret: compute it without a TPU, in jax.numpy; for tests.
    """
    problem = _problem(queries, memory, precision, interpret)
    C, H, R, E = problem.query.shape
    mixed, log_sum = _over_keys(
        _forward_kernel, problem, (), {"query": [dtype], "row": [jnp.float32]},
        scratch=((E, problem.n), (1, problem.n), (1, problem.n)), products=2,
    )  # fmt: skip
    return rows_first(mixed, queries, memory), rows_first(log_sum.reshape(C, H, R, 1), queries, memory)[..., 0]


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
    problem = _problem(queries, memory, precision, interpret)
    E, M = problem.query.shape[-1], memory.ids_CxM.shape[1]
    rows = [queries_first(leaf[..., None], queries, memory, problem.n) for leaf in (log_sum, delta)]
    more = (
        *(jnp.swapaxes(leaf, 2, 3) for leaf in rows),
        queries_first(grad.astype(problem.query.dtype), queries, memory, problem.n),
    )
    (of_queries,) = _over_keys(
        _query_gradient_kernel, problem, more, {"query": [dtype]}, scratch=((E, problem.n),), products=3
    )
    of_keys, of_values = _over_queries(
        _key_gradient_kernel, problem, more, scratch=((problem.m, E), (problem.m, E)), products=4
    )
    return rows_first(of_queries, queries, memory), of_keys[:, :, :M], of_values[:, :, :M]


# What is computed of a block of queries and a block of keys.


def _product(x: jax.Array, y: jax.Array, axes: tuple[int, int], precision: Any) -> jax.Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _seen(of_queries: Any, of_keys: Any) -> jax.Array:
    """Bool m x n."""
    ids, after, until = (of_queries[i : i + 1] for i in range(3))
    key_ids, positions = (_column(of_keys[i : i + 1]) for i in range(2))
    return rule((ids, after, until), (key_ids, positions))


def _column(row: jax.Array) -> jax.Array:
    """A row 1 x m as a column m x 1."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))[:, :1]


def _forward_kernel(at: _At, precision: Any, *refs: Any) -> None:
    of_queries, of_keys, query, keys, values, mixed, log_sum, sums, highest, total = refs

    def start() -> None:
        sums[...] = jnp.zeros_like(sums)
        highest[...] = jnp.full_like(highest, HIDDEN)
        total[...] = jnp.zeros_like(total)

    def add(masked: bool) -> None:
        score = _product(keys[...], query[...], (1, 1), precision)
        if masked:
            score = jnp.where(_seen(of_queries, of_keys), score, HIDDEN)
        before = highest[...]
        higher = jnp.maximum(before, score.max(0, keepdims=True))
        weight, fade = jnp.exp(score - higher), jnp.exp(before - higher)
        highest[...] = higher
        total[...] = total[...] * fade + weight.sum(0, keepdims=True)
        new = _product(values[...], weight.astype(values.dtype), (0, 0), precision)
        sums[...] = sums[...] * fade + new

    def end() -> None:
        own_total = jnp.maximum(total[...], TINY)
        mixed[...] = jnp.transpose(sums[...] / own_total).astype(mixed.dtype)
        log_sum[...] = highest[...] + jnp.log(own_total)

    at.run(start, add, end)


def _score_gradient(masked: bool, precision: Any, refs: Any) -> tuple[jax.Array, jax.Array]:
    """Weights m x n, and the gradient of the scores."""
    of_queries, of_keys, query, keys, values, log_sum, delta, grad = refs
    weight = jnp.exp(_product(keys[...], query[...], (1, 1), precision) - log_sum[...])
    if masked:
        weight = jnp.where(_seen(of_queries, of_keys), weight, 0.0)
    return weight, weight * (_product(values[...], grad[...], (1, 1), precision) - delta[...])


def _query_gradient_kernel(at: _At, precision: Any, *refs: Any) -> None:
    *inputs, of_query, sums = refs
    keys = inputs[3]

    def start() -> None:
        sums[...] = jnp.zeros_like(sums)

    def add(masked: bool) -> None:
        _, of_score = _score_gradient(masked, precision, inputs)
        sums[...] += _product(keys[...], of_score.astype(keys.dtype), (0, 0), precision)

    def end() -> None:
        of_query[...] = jnp.transpose(sums[...]).astype(of_query.dtype)

    at.run(start, add, end)


def _key_gradient_kernel(at: _At, precision: Any, *refs: Any) -> None:
    *inputs, of_keys, of_values, key_sums, value_sums = refs
    query, grad = inputs[2], inputs[7]

    def start() -> None:
        key_sums[...] = jnp.zeros_like(key_sums)
        value_sums[...] = jnp.zeros_like(value_sums)

    def add(masked: bool) -> None:
        weight, of_score = _score_gradient(masked, precision, inputs)
        key_sums[...] += _product(of_score.astype(query.dtype), query[...], (1, 0), precision)
        value_sums[...] += _product(weight.astype(grad.dtype), grad[...], (1, 0), precision)

    def end() -> None:
        of_keys[...] = key_sums[...].astype(of_keys.dtype)
        of_values[...] = value_sums[...].astype(of_values.dtype)

    at.run(start, add, end)


# How a kernel goes over the blocks.


@dataclass(frozen=True)
class _At:
    """Where a kernel is: the innermost of its axes goes over the blocks that are summed up."""

    kind: jax.Array
    """0, SOME or ALL."""
    first: jax.Array
    last: jax.Array

    def run(self, start: Callable[[], None], add: Callable[[bool], None], end: Callable[[], None]) -> None:
        """Sums up: `add` gets whether there are keys to hide."""
        pl.when(self.first)(start)
        pl.when(self.kind == SOME)(lambda: add(True))
        pl.when(self.kind == ALL)(lambda: add(False))
        pl.when(self.last)(end)


class _Walk(NamedTuple):
    """The order in which a kernel goes over entries, heads, blocks, and blocks that are summed up."""

    grid: tuple[int, ...]
    """Sizes."""
    inner: int
    """Blocks that are summed up; the last axis of the grid is a multiple."""
    table: jax.Array
    """From `_table`."""
    place: Callable[..., tuple[Any, ...]]
    """From indices of the grid, and the table: c, h, k, i, j."""


def _over_keys(
    kernel: Callable[..., None], problem: Problem, more: tuple[jax.Array, ...], outputs: dict[str, list[Any]],
    scratch: tuple[tuple[int, ...], ...], products: int,
) -> list[jax.Array]:  # fmt: skip
    """Runs a kernel that sums over keys, for each block of queries of each head."""
    (C, H, R, E), (I, J), G = problem.query.shape, problem.blocks, problem.group  # noqa: E741
    table = _table(problem)

    def place(c: Any, h: Any, i: Any, j: Any, table: Any) -> tuple[Any, ...]:
        return c, h, jax.lax.div(h, jnp.int32(G)), i, table[(c * I + i) * J + j] >> 2

    shapes = {"query": (C, H, R, E), "row": (C, H, 1, R)}
    results = [(kind, jax.ShapeDtypeStruct(shapes[kind], t)) for kind, types in outputs.items() for t in types]
    return _call(kernel, problem, more, results, _Walk((C, H, I, J), J, table, place), scratch, products)


def _over_queries(
    kernel: Callable[..., None], problem: Problem, more: tuple[jax.Array, ...],
    scratch: tuple[tuple[int, ...], ...], products: int,
) -> list[jax.Array]:  # fmt: skip
    """Runs a kernel that sums over queries, of all heads that share keys, for each block of keys."""
    (C, K, _, _), (I, J), G = problem.keys.shape, problem.blocks, problem.group  # noqa: E741
    table = _table(problem, by_keys=True)

    def place(c: Any, k: Any, j: Any, step: Any, table: Any) -> tuple[Any, ...]:
        g, i = jax.lax.div(step, jnp.int32(I)), jax.lax.rem(step, jnp.int32(I))
        return c, k * G + g, k, table[(c * J + j) * I + i] >> 2, j

    results = [("keys", jax.ShapeDtypeStruct(a.shape, a.dtype)) for a in (problem.keys, problem.values)]
    return _call(kernel, problem, more, results, _Walk((C, K, J, G * I), I, table, place), scratch, products)


def _call(
    kernel: Callable[..., None], problem: Problem, more: tuple[jax.Array, ...],
    results: list[tuple[str, jax.ShapeDtypeStruct]], walk: _Walk, scratch: tuple[tuple[int, ...], ...], products: int,
) -> list[jax.Array]:  # fmt: skip
    """Runs a kernel over a grid.

    Args:
      kernel: from `_At`, a precision, and references to operands, results and scratch.
      problem: its operands.
      more: log-sum-exp, delta and gradient, where the kernel is of the gradient.
      results: what it writes: "query", "row" or "keys", by what it has one of; and its shape and type.
      walk: where each step of the grid is.
      scratch: shapes of float32 sums.
      products: of all queries with all keys.
    """
    (n, m), E = (problem.n, problem.m), problem.query.shape[-1]
    grid, inner, table, place = walk
    specs: dict[str, tuple[tuple[int | None, ...], Callable[..., tuple[Any, ...]]]] = {
        "of_queries": ((None, 3, n), lambda c, h, k, i, j: (c, 0, i)),
        "of_keys": ((None, 2, m), lambda c, h, k, i, j: (c, 0, j)),
        "query": ((None, None, n, E), lambda c, h, k, i, j: (c, h, i, 0)),
        "row": ((None, None, 1, n), lambda c, h, k, i, j: (c, h, 0, i)),
        "keys": ((None, None, m, E), lambda c, h, k, i, j: (c, k, j, 0)),
    }

    def spec(kind: str) -> Any:
        block, index = specs[kind]
        return pl.BlockSpec(block, lambda *at: index(*place(*at)))

    def body(table: Any, *refs: Any) -> None:
        c, outer, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        kind = table[(c * grid[2] + outer) * inner + jax.lax.rem(step, jnp.int32(inner))] & 3
        kernel(_At(kind, step == 0, step == grid[3] - 1), problem.precision, *refs)

    operands = (problem.of_queries, problem.of_keys, problem.query, problem.keys, problem.values, *more)
    kinds = ("of_queries", "of_keys", "query", "keys", "keys", "row", "row", "query")[: len(operands)]
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[spec(kind) for kind in kinds],
            out_specs=[spec(kind) for kind, _ in results],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[shape for _, shape in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(problem, (*zip(kinds, operands, strict=True), *results), products, results[0][0] == "keys"),
        interpret=problem.interpret,
        name="attention" + kernel.__name__.removesuffix("_kernel"),
    )
    outputs: list[jax.Array] = call(table, *operands)
    return outputs


def _cost(problem: Problem, arrays: tuple[tuple[str, Any], ...], products: int, over_queries: bool) -> Any:
    """What a kernel states to XLA, as if every query saw every key. What is summed over is read for each block."""
    (I, J), H = problem.blocks, problem.query.shape[1]  # noqa: E741
    repeated = H // problem.group * J if over_queries else H * I
    bytes_ = 0.0
    for kind, array in arrays:
        size = float(array.size * array.dtype.itemsize)
        if over_queries:
            bytes_ += size * (repeated if kind == "of_queries" else J if kind in ("query", "row") else 1)
        else:
            bytes_ += size * (repeated if kind == "of_keys" else I * problem.group if kind == "keys" else 1)
    return pl.CostEstimate(
        flops=int(products * problem.product_flops),
        transcendentals=int(problem.product_flops / 2 / problem.query.shape[-1]),
        bytes_accessed=int(bytes_),
    )


# What the kernels are given.


def _problem(queries: Queries, memory: Memory, precision: Any, interpret: bool) -> Problem:
    C, M = memory.ids_CxM.shape
    wide = queries.query_BxKxGxNxE.dtype.itemsize == 4
    n, m = (_size(count, EXACT_BLOCK if wide else BLOCK) for count in (queries.ids_BxN.size // C, M))
    exact = wide and precision not in (None, jax.lax.Precision.DEFAULT)
    # A kernel has no other precisions than these.
    products = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return lay_out(queries, memory, (n, m), products, interpret)


def _size(count: int, most: int) -> int:
    """The size of blocks of at most `most`, as many as it takes, that are about equally large."""
    each = math.ceil(count / math.ceil(count / most))
    return LANES * math.ceil(each / LANES)


def _table(problem: Problem, by_keys: bool = False) -> jax.Array:
    """Int32 [C·I·J] (by keys: [C·J·I]): how many keys of a block are seen, plus 4 times the block to fetch.

    That is the block itself if any are. Else it is the one that is there already, or the first that will be needed, so
    that nothing is fetched for it.
    """
    seen = kinds(problem)
    seen = jnp.swapaxes(seen, 1, 2) if by_keys else seen
    numbers = jnp.arange(seen.shape[2], dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(seen > 0, numbers, -1), axis=2)
    first = jnp.argmax(seen > 0, 2, keepdims=True).astype(jnp.int32)
    return (seen + 4 * jnp.where(latest < 0, first, latest)).astype(jnp.int32).reshape(-1)

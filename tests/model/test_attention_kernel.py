"""The kernels for TPUs and GPUs, interpreted on a CPU: against plain products, in values and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted_attention import INTERPRETED, problem, value_and_gradients

from mod_star.model import attention_kernel, attention_layout, attention_triton, attention_whole
from mod_star.model.attention_primitive import KERNEL, TRITON
from mod_star.model.attention_whole import Memory, Queries

CASES: dict[str, dict[str, Any]] = {
    "one document": {},
    "packed": {"documents": 4},
    "gathered, windowed": {"documents": 2, "window": 100},
    "whole": {"whole": True},
}
SHARED = (6, 2, 2, 1, 50, 260, 8)
"""Three rows of queries for each of keys."""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BLOCK", "EXACT_BLOCK"):
        monkeypatch.setattr(attention_kernel, name, 128)


@functools.cache
def compiled(memories: int, platform: str | None) -> Any:
    """A platform's kernels (None: plain products), compiled once for all cases."""
    way = None if platform is None else INTERPRETED[platform]
    return jax.jit(functools.partial(value_and_gradients, memories, way))


def assert_equal(memories: int, platform: str, operands: Any) -> tuple[jax.Array, ...]:
    """Also gives what plain products compute."""
    arrays = jax.tree.leaves(operands)
    cotangents = jnp.cos(arrays[0]), jnp.sin(arrays[0][..., 0])
    expected, ours = (compiled(memories, which)(arrays, cotangents) for which in (None, platform))
    for leaf, its in zip(ours, expected, strict=True):
        np.testing.assert_allclose(leaf, its, atol=1e-5 * max(1.0, float(jnp.abs(its).max())))
    return expected


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("platform", INTERPRETED)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_plain_products(case: str, platform: str) -> None:
    _, log_sum, *_ = assert_equal(1, platform, problem(**CASES[case]))
    assert case == "whole" or 0 < np.mean(log_sum == 0) < 0.9, "some queries see nothing"


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_a_large_memory_that_rows_share_and_a_small_one_of_each_are_put_together() -> None:
    """Thoughts: their text by the kernel, their own tokens by plain products. GPUs' kernels get the same layout."""
    queries, text = problem(SHARED, documents=2)
    _, own = problem((6, 6, 2, 1, 50, 20, 8), documents=2, seed=1)
    assert_equal(2, "tpu", (queries, [text, own]))


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("platform", INTERPRETED)
def test_in_16_bits_it_is_as_near_to_float32_as_plain_products(platform: str) -> None:
    """Both round weights and gradients of scores to 16 bits before they are multiplied."""
    narrow = problem(dtype=jnp.bfloat16)
    wide: Any = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, narrow)
    plain, kernel = compiled(1, None), compiled(1, platform)
    found = {}
    for name, operands, way in (("exact", wide, plain), ("plain", narrow, plain), ("kernel", narrow, kernel)):
        arrays = jax.tree.leaves(operands)
        cotangents = jnp.cos(arrays[0]).astype(jnp.bfloat16), jnp.sin(arrays[0][..., 0]).astype(jnp.float32)
        found[name] = way(arrays, cotangents)
    for exact, other, ours in zip(found["exact"], found["plain"], found["kernel"], strict=True):
        error = lambda leaf, exact=exact: float(jnp.abs(leaf.astype(jnp.float32) - exact).max())  # noqa: E731
        assert ours.dtype == other.dtype
        assert error(ours) <= 1.5 * error(other) + 1e-6 and error(ours) <= 0.02 * float(jnp.abs(exact).max())


def seen_by_blocks(of_queries: jax.Array, of_keys: jax.Array, blocks: tuple[int, int]) -> np.ndarray:
    """Bool C x I x n x J x m, of `attention_layout.Problem`'s arrays and sizes of blocks."""
    (C, _, R), M, (n, m) = of_queries.shape, of_keys.shape[2], blocks
    columns, keys = ([np.asarray(a)[:, i] for i in range(a.shape[1])] for a in (of_queries, of_keys))
    columns_and_keys: Any = tuple(columns), tuple(keys)
    seen: Any = attention_whole.sees(*columns_and_keys)
    return np.asarray(seen.reshape(C, R // n, n, M // m, m))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_the_table_hides_no_key_that_is_seen_and_shows_none_that_is_hidden(case: str, seed: int) -> None:
    queries, memory = problem(**CASES[case], seed=seed)
    own = attention_kernel._problem(queries, memory, None, False)
    (I, J), C = own.blocks, own.of_keys.shape[0]  # noqa: E741
    seen = seen_by_blocks(own.of_queries, own.of_keys, (own.n, own.m))
    some, every = seen.any((2, 4)), seen.all((2, 4))
    for by_keys in (False, True):
        table = np.asarray(attention_kernel._table(own, by_keys)).reshape(C, *((J, I) if by_keys else (I, J)))
        kinds, fetched = (np.swapaxes(a, 1, 2) if by_keys else a for a in (table & 3, table >> 2))
        assert not np.any(some & (kinds == 0)) and not np.any(~every & (kinds == attention_layout.ALL))
        number = np.arange(I)[:, None] if by_keys else np.arange(J)
        assert np.all((fetched == number) | (kinds == 0))


@jax.jit
def spans_of(queries: Queries, memory: Memory) -> tuple[jax.Array, ...]:
    own = attention_triton._problem(queries, memory, (16, 16), None, False)
    kinds = attention_layout.kinds(own)
    return own.of_queries, own.of_keys, attention_triton._spans(kinds), attention_triton._spans(kinds.swapaxes(1, 2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_spans_leave_out_no_key_that_is_seen_and_show_none_that_is_hidden(case: str, seed: int) -> None:
    queries, memory = problem(**CASES[case], seed=seed)
    of_queries, of_keys, *spans = spans_of(queries, memory)
    seen = seen_by_blocks(of_queries, of_keys, (16, 16))
    some, every = seen.any((2, 4)), seen.all((2, 4))
    for turned, own in ((lambda a: a, spans[0]), (lambda a: np.swapaxes(a, 1, 2), spans[1])):
        first, from_, to, end = np.moveaxis(np.asarray(own)[..., None], 2, 0)
        assert np.all((first >= 0) & (first <= from_) & (from_ <= to) & (to <= end))
        number = np.arange(turned(some).shape[2])
        assert not np.any(turned(some) & ((number < first) | (number >= end)))
        inside = (number >= from_) & (number < to)
        assert not np.any(~turned(every) & inside)
        assert np.any(inside) or case != "whole"


def test_causal_attention_computes_half_of_the_blocks_and_masks_the_diagonal() -> None:
    at = jnp.arange(2048, dtype=jnp.int32)[None]
    query = jnp.zeros((1, 1, 1, 2048, 8), jnp.bfloat16)
    queries = Queries(query, jnp.ones_like(at), jnp.full_like(at, -1))
    memory = Memory(query[:, :, 0], query[:, :, 0], jnp.ones_like(at), at, at)
    table = np.asarray(attention_kernel._table(attention_kernel._problem(queries, memory, None, False))).reshape(4, 4)
    assert (table & 3).tolist() == [[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]]
    assert (table >> 2).tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]]


def test_a_single_query_is_left_to_plain_products() -> None:
    for way in (KERNEL, TRITON):
        assert not way.is_large(*problem((8, 8, 2, 1, 1, 4096, 8)))
        assert way.is_large(*problem())
        assert way.is_large(*problem(SHARED)), "what matters is how many queries share keys"


WIDTHS = [(256, "float32", True), (257, "float32", False), (257, "bfloat16", True)]


@pytest.mark.parametrize(("E", "dtype", "fits"), WIDTHS)
def test_a_head_too_wide_for_shared_memory_is_left_to_plain_products(E: int, dtype: Any, fits: bool) -> None:
    assert TRITON.is_large(*problem((1, 1, 1, 1, 128, 128, E), dtype=dtype)) == fits

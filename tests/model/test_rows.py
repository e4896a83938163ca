"""Computing some rows: the same as computing all and masking, however `vmap`s are nested, and really less work."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.decoding.step import within_a_chunk
from mod_star.model.rows import Picked, compute_if, compute_rows, in_chunks, rows_at_once

calls: Counter[str] = Counter()
SIZES = (4, 3, 2)
"""Of the vmaps, innermost first."""


def function(x_D: jax.Array, pair: tuple[jax.Array, jax.Array], weight_37xD: jax.Array) -> dict[str, jax.Array]:
    """Counts the rows that it really runs for; never zero where it is computed."""
    offset_D, number = pair
    jax.debug.callback(lambda _: calls.update(rows=1), x_D[0])
    hidden = weight_37xD @ (x_D + offset_D)
    return {"real": jnp.sum(jnp.cosh(hidden)), "whole": number * 2 + 1, "vector": jnp.cosh(hidden[:3])}


def counted(run: Any) -> tuple[Any, int]:
    jax.effects_barrier()
    calls.clear()
    result = jax.block_until_ready(run())
    jax.effects_barrier()
    return result, calls["rows"]


@pytest.mark.parametrize("rows", [1, 7])
def test_rows_equal_computing_all_and_masking_in_as_many_chunks_as_it_takes(rows: int) -> None:
    rng = np.random.default_rng(0)
    x, offset = (jnp.asarray(rng.normal(size=(rows, 5)), jnp.float32) for _ in range(2))
    args = (x, (offset, jnp.arange(rows, dtype=jnp.int32)))
    each = jax.vmap(partial(function, weight_37xD=jnp.asarray(rng.normal(size=(37, 5)), jnp.float32)))
    some = jax.jit(lambda wanted, *args: compute_rows(each, wanted, args, 0.25))
    everything, _ = counted(lambda: jax.jit(each)(*args))
    chunk = rows_at_once(rows, 0.25)
    assert chunk == (1 if rows == 1 else 4)
    for picked in ([], [rows - 1], range(0, rows, 2), range(rows)):
        wanted = np.isin(np.arange(rows), list(picked))
        result, count = counted(partial(some, wanted, *args))
        assert count == chunk * math.ceil(wanted.sum() / chunk)
        assert_equal_where(wanted, result, everything)


def test_one_chunk_is_computed_whatever_is_wanted() -> None:
    rng = np.random.default_rng(1)
    x, numbers = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32), jnp.arange(7, dtype=jnp.int32)
    args = (x, (x[::-1], numbers))
    each = jax.vmap(partial(function, weight_37xD=jnp.asarray(rng.normal(size=(37, 5)), jnp.float32)))
    some = jax.jit(lambda wanted, *args: compute_rows(each, wanted, args, 0.25, one_chunk=True))
    everything, _ = counted(lambda: jax.jit(each)(*args))
    for picked in ([], [6], [0, 2, 4, 6]):
        wanted = np.isin(np.arange(7), picked)
        result, count = counted(partial(some, wanted, *args))
        assert count == rows_at_once(7, 0.25) == 4
        assert_equal_where(wanted, result, everything)
    assert "while" not in some.lower(np.ones(7, bool), *args).as_text()


@pytest.mark.parametrize("few", [7, 6], ids=["by pairs", "sorted"])
def test_the_chunks_hold_each_wanted_row_once_and_say_which_others_fill_them_up(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mod_star.model.rows.FEW_ROWS", few)

    def count(picked: Picked, counts_R: jax.Array) -> jax.Array:
        return counts_R.at[picked.rows_C].add(picked.needed_C.astype(jnp.int32))

    some = jax.jit(lambda wanted: in_chunks(count, wanted, jnp.zeros(7, jnp.int32), 0.25))
    assert ("stablehlo.sort" in some.lower(np.zeros(7, bool)).as_text()) == (few < 7)
    for picked in ([], [6], [0, 2, 4, 6], [1, 2, 3, 4, 5], range(7)):  # chunks of 4
        wanted = np.isin(np.arange(7), list(picked))
        np.testing.assert_array_equal(some(wanted), wanted)


def test_of_the_wanted_rows_a_chunk_holds_those_with_the_highest_scores() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        wanted, scores = rng.random(9) < 0.6, rng.integers(-3, 3, 9).astype(np.float32)  # some scores are equal
        room = rows_at_once(9, 0.2)
        kept = sorted((row for row in range(9) if wanted[row]), key=lambda row: (-scores[row], row))[:room]
        found = np.asarray(within_a_chunk(jnp.asarray(wanted), jnp.asarray(scores), 0.2))
        assert np.flatnonzero(found).tolist() == sorted(kept)


def assert_equal_where(wanted: Any, result: Any, everything: Any) -> None:
    """Rows that are not wanted are zeros; types are kept."""
    expected = jax.tree.map(
        lambda a: np.where(np.expand_dims(wanted, tuple(range(wanted.ndim, a.ndim))), a, 0).astype(a.dtype), everything
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, strict=True), result, expected)


def nested(f: Any, depth: int, outer: bool) -> Any:
    """`f` under `depth` vmaps. The number is batched by the innermost alone; offset and weight by the outermost alone,
    or by none."""
    for level in range(depth):
        own = 0 if outer and level == depth - 1 else None
        f = jax.vmap(f, (0, 0, (own, 0 if level == 0 else None), own))
    return f


@pytest.mark.parametrize("outer", [False, True], ids=["shared by all", "batched by the outermost"])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_under_nested_vmaps_it_equals_computing_all_and_masking(depth: int, outer: bool) -> None:
    rng = np.random.default_rng(1)
    shape = SIZES[:depth][::-1]
    own = shape[:1] if outer else ()
    normal = lambda *size: jnp.asarray(rng.normal(size=size), jnp.float32)  # noqa: E731
    numbers = jnp.arange(4, dtype=jnp.int32) if depth else jnp.int32(3)
    args = (normal(*shape, 5), (normal(*own, 5), numbers), normal(*own, 37, 5))
    conditional = lambda wanted, *args: compute_if(wanted, function, args, 0.2)  # noqa: E731
    some = jax.jit(nested(conditional, depth, outer))
    everything, _ = counted(
        lambda: jax.jit(nested(lambda _, *args: function(*args), depth, outer))(np.ones(shape, bool), *args)
    )
    R = math.prod(shape)
    chunk = rows_at_once(R, 0.2)
    for share in (0.0, 0.2, 0.6, 1.0):
        wanted = np.asarray(rng.random(shape) < share)
        result, count = counted(partial(some, wanted, *args))
        assert_equal_where(wanted, result, everything)
        if not outer or depth < 2:
            assert count == chunk * math.ceil(wanted.sum() / chunk), "all vmaps make one pool"
        elif not wanted.any():
            assert count == 0
    if not outer:
        text = str(jax.make_jaxpr(some)(wanted, *args))
        assert "37,5]" in text and not re.search(r"\[(\d+,)+37,5\]", text), "what is shared is never copied"


def test_a_condition_that_is_not_batched_computes_all_rows_or_none() -> None:
    x, offset = jnp.arange(15.0).reshape(3, 5) / 10, jnp.zeros(5)
    weight, numbers = jnp.ones((37, 5)), jnp.arange(3)
    run = jax.jit(
        jax.vmap(lambda wanted, x, n: compute_if(wanted, function, (x, (offset, n), weight), 1.0), (None, 0, 0))
    )
    result, count = counted(lambda: run(False, x, numbers))
    assert count == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(result))
    result, count = counted(lambda: run(True, x, numbers))
    assert count == 3
    np.testing.assert_array_equal(result["whole"], [1, 3, 5])

"""Attention in blocks, without its scores: against the plain formula, in values, gradients and memory."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_attention import plain_attention
from some_nightly import some_nightly

from mod_star.model import attention_blocks, attention_whole
from mod_star.model.attention import KeyValues, attend
from mod_star.model.attention_primitive import attention, attention_flops, attention_p, gradient_p

E = 8
CASES = {
    # tokens, key heads, queries per key head, documents, window
    "one document": (320, 2, 1, 1, None),
    "packed, ragged": (301, 1, 3, 4, None),
    "packed, windowed": (270, 2, 2, 3, 40),
    "one key head for many": (200, 1, 8, 2, None),
    "odd number of heads": (257, 3, 1, 2, None),
}


def problem(tokens: int, K: int, G: int, documents: int, seed: int = 0, rows: int = 2) -> tuple[Any, ...]:
    """Queries, positions, documents, keys/values of `rows` sequences: padding at the end, and some invalid slots."""
    rng = np.random.default_rng(seed)
    positions, ids = np.zeros((rows, tokens), np.int32), np.zeros((rows, tokens), np.int32)
    for row in range(rows):
        ends = [*np.sort(rng.choice(np.arange(1, tokens - 8), documents - 1, replace=False)), tokens - 7 * row]
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), start=1):
            positions[row, start:end], ids[row, start:end] = np.arange(end - start), number
    query = rng.normal(size=(rows, tokens, K * G, E)).astype(np.float32)
    keys, values = (rng.normal(size=(rows, K, tokens, E)).astype(np.float32) for _ in range(2))
    valid = (rng.random((rows, tokens)) < 0.9) & (ids > 0)
    arrays: Any = jax.tree.map(jnp.asarray, (query, positions, ids, keys, values, positions, ids, valid))
    return *arrays[:3], KeyValues(*arrays[3:])


def value_and_gradients(attention: Callable[..., jax.Array], args: tuple[Any, ...], window: int | None) -> Any:
    """Of all rows, where a query sees something."""
    query, positions, ids, own = args

    def loss(query: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(query: jax.Array, positions: jax.Array, ids: jax.Array, own: KeyValues) -> jax.Array:
            return attention(query, positions, ids, (own,), window=window)

        result = jax.vmap(one)(query, positions, ids, replace(own, keys_KxMxE=keys, values_KxMxE=values))
        result = jnp.where(sees_something(args, window)[:, :, None, None], result, 0)
        return jnp.sum(jnp.sin(result)), result

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(query, own.keys_KxMxE, own.values_KxMxE)


def sees_something(args: tuple[Any, ...], window: int | None) -> jax.Array:
    _, positions, ids, own = args
    seen = (ids[:, :, None] == ids[:, None]) & (positions[:, None] <= positions[:, :, None]) & own.valid_M[:, None]
    seen = seen if window is None else seen & (positions[:, :, None] - positions[:, None] < window)
    return jnp.any(seen, -1)


@pytest.mark.parametrize("case", some_nightly(CASES, "one document", "odd number of heads"))
@pytest.mark.slow
def test_values_and_gradients_are_those_of_the_plain_formula(case: str) -> None:
    tokens, K, G, documents, window = CASES[case]
    args = problem(tokens, K, G, documents)
    (_, result), gradients = value_and_gradients(attend, args, window)
    (_, expected), expected_gradients = value_and_gradients(plain_attention, args, window)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    for gradient, its in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, its, atol=1e-5 * float(jnp.abs(its).max()))


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_the_last_position_that_is_seen_may_be_the_first_of_a_block(beyond: int) -> None:
    query, positions, ids, own = jax.tree.map(lambda leaf: leaf[0], problem(200, 1, 1, 1))
    until = jnp.int32(attention_blocks._even(200, attention_blocks.BLOCK) + beyond)
    text = replace(own, valid_M=own.valid_M.at[until].set(True), until=until)
    result, expected = (way(query, positions, ids, (text,)) for way in (jax.jit(attend), plain_attention))
    np.testing.assert_allclose(result[until:], expected[until:], atol=1e-5)


@pytest.mark.parametrize("tokens", [200, 40], ids=["in blocks", "whole"])
def test_the_log_sum_exp_has_the_gradient_of_the_plain_formula(tokens: int) -> None:
    query, positions, ids, own = jax.tree.map(lambda leaf: leaf[:1], problem(tokens, 1, 1, 1))
    after = jnp.full((1, tokens), -1, jnp.int32)

    def loss(way: Callable[..., Any], *arrays: jax.Array) -> jax.Array:
        result, log_sum = way(*arrays)
        return jnp.sum(jnp.cos(result)) + jnp.sum(jnp.sin(log_sum))

    def ours(query: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        queries = attention_whole.Queries(query[:, None, None], ids, after)
        memory = attention_whole.Memory(keys[:, None], values[:, None], ids, positions, positions)
        return attention(queries, [memory], None, None)

    def plain(query: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jnp.where(jnp.tri(tokens, dtype=bool), query @ jnp.swapaxes(keys, 1, 2), -jnp.inf)
        return jax.nn.softmax(scores) @ values, jax.nn.logsumexp(scores, -1)

    arrays = (query[:, :, 0], own.keys_KxMxE[:, 0], own.values_KxMxE[:, 0])
    gradients, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, way), (0, 1, 2)))(*arrays) for way in (ours, plain)
    )
    for gradient, its in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(gradient, its, rtol=1e-5, atol=1e-5 * float(jnp.abs(its).max()))


def test_queries_that_see_no_block_stay_finite_and_have_no_gradient() -> None:
    query, positions, ids, own = jax.tree.map(lambda leaf: leaf[0], problem(300, 1, 1, 1))
    ids = jnp.where(jnp.arange(300) >= 150, 5, ids)  # a document without keys; it fills the last block

    def loss(query: jax.Array, own: KeyValues) -> tuple[jax.Array, jax.Array]:
        result = attend(query, positions, ids, (own,))
        return jnp.sum(result), result

    (_, result), (gradient, of_own) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True, allow_int=True))(
        query, own
    )
    assert np.all(np.isfinite(result)) and not np.any(result[-40:])
    assert np.any(gradient[:150]) and not np.any(gradient[150:])
    assert np.all(np.isfinite(of_own.keys_KxMxE)) and np.all(np.isfinite(of_own.values_KxMxE))


@pytest.mark.slow
def test_queries_in_turn_are_those_of_the_plain_formula() -> None:
    """What accelerators and meshes compute: plain products, some queries after the others."""
    query, positions, ids, own = jax.tree.map(lambda leaf: leaf[0], problem(700, 2, 1, 3))
    at = lambda leaf: leaf[None]  # noqa: E731
    queries = attention_whole.Queries(
        at(jnp.swapaxes(query, 0, 1)[:, None] * E**-0.5), at(ids), at(jnp.full(700, -1, jnp.int32))
    )
    ids_M = jnp.where(own.valid_M, ids, -1)
    memory = attention_whole.Memory(*map(at, (own.keys_KxMxE, own.values_KxMxE, ids_M, positions, positions)))
    assert attention_whole._queries_at_once(queries, [memory]) is not None
    result, log_sum = jax.jit(lambda *a: attention_whole.forward_in_turn(a[0], [a[1]], None))(queries, memory)
    expected = jax.jit(plain_attention)(query, positions, ids, (own,))
    seen = sees_something((None, positions[None], ids[None], replace(own, valid_M=own.valid_M[None])), None)[0]
    turned = jnp.swapaxes(result[0, :, 0], 0, 1)
    np.testing.assert_allclose(turned[seen], expected[seen], atol=1e-5)
    grad = jnp.where(seen[:, None], jnp.cos(result), 0)
    delta = jnp.sum(result * grad, -1)
    gradient_of = lambda way: jax.jit(lambda *a: way(*a[:2], None, *a[2:]))(queries, memory, log_sum, delta, grad)  # noqa: E731
    blocks = gradient_of(attention_blocks.gradient)
    for way in (attention_whole.gradient_in_turn, attention_whole.gradient):
        gradients = gradient_of(way)
        for gradient, its in zip(gradients, blocks, strict=True):
            np.testing.assert_allclose(gradient, its, atol=1e-5 * float(jnp.abs(its).max()))


def thoughts_over_a_text(attention: Callable[..., jax.Array], text_tokens: int, seed: int = 3) -> Any:
    """Values and gradients where several thoughts share the keys of their text, and each has keys of its own."""
    *_, text = problem(text_tokens, 2, 2, 1, seed)
    rng = np.random.default_rng(seed)
    places, thoughts, T = np.array([3, 60, 61, text_tokens - 20]), 3, 14
    own = jnp.asarray(rng.normal(size=(2, len(places), thoughts, 2, T, E)), jnp.float32)
    asked = jnp.asarray(rng.normal(size=(2, len(places), thoughts, T, 4, E)), jnp.float32)

    def loss(asked: jax.Array, own: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(place: jax.Array, asked: jax.Array, own: jax.Array, text: KeyValues) -> jax.Array:
            after = place + 1 + jnp.arange(T, dtype=jnp.int32)
            mine = KeyValues(own, jnp.cos(own), after, jnp.ones(T, jnp.int32), jnp.ones(T, bool))
            return attention(asked, after, jnp.ones(T, jnp.int32), (replace(text, until=place), mine))

        each = jax.vmap(jax.vmap(one, (None, 0, 0, None)), (0, 0, 0, None))
        shared = replace(text, keys_KxMxE=keys, values_KxMxE=values)
        result = jax.vmap(each, (None, 0, 0, 0))(jnp.asarray(places, jnp.int32), asked, own, shared)
        return jnp.sum(jnp.sin(result)), result

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(asked, own, text.keys_KxMxE, text.values_KxMxE)


@pytest.mark.parametrize("tokens", [200, 90], ids=["in blocks", "whole"])
@pytest.mark.slow
def test_thoughts_that_share_a_text_are_those_of_the_plain_formula(tokens: int) -> None:
    (_, result), gradients = thoughts_over_a_text(attend, tokens)
    (_, expected), expected_gradients = thoughts_over_a_text(plain_attention, tokens)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    for gradient, its in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, its, atol=1e-5 * float(jnp.abs(its).max()))


def test_the_text_of_thoughts_is_never_copied_for_them() -> None:
    """Their vmap makes more queries of the same keys."""
    jaxpr = str(jax.make_jaxpr(lambda: thoughts_over_a_text(attend, 200))())
    sizes = {np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]*,200,8)\]", jaxpr)}
    assert sizes == {2 * 2 * 200 * 8}


@pytest.mark.slow
def test_a_vmap_over_keys_inside_one_over_queries_is_right() -> None:
    """Rows that share a memory, which then gets an axis of its own: the order of the axes matters."""
    query, positions, ids, own = problem(150, 2, 1, 2, rows=6)
    queries = query.reshape(2, 3, *query.shape[1:])
    memories = jax.tree.map(lambda leaf: leaf[:3], own)

    def one(query: jax.Array, own: KeyValues) -> jax.Array:
        return attend(query, positions[0], ids[0], (own,))

    nested = jax.jit(jax.vmap(jax.vmap(one), (0, None)))(queries, memories)
    other = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (1, 0)))(queries, memories)
    for i in range(2):
        for j in range(3):
            expected = one(queries[i, j], jax.tree.map(lambda leaf, j=j: leaf[j], memories))
            np.testing.assert_allclose(nested[i, j], expected, atol=1e-5)
            np.testing.assert_allclose(other[j, i], expected, atol=1e-5)


@pytest.mark.slow
def test_derivatives_forwards_and_backwards_agree() -> None:
    query, positions, ids, own = jax.tree.map(lambda leaf: leaf[0], problem(40, 2, 1, 1))
    own = replace(own, valid_M=own.valid_M.at[0].set(True))

    def loss(query: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attend(query, positions, ids, (own,))))

    direction = jnp.cos(query)
    _, forwards = jax.jit(lambda query: jax.jvp(loss, (query,), (direction,)))(query)
    np.testing.assert_allclose(forwards, jnp.vdot(jax.jit(jax.grad(loss))(query), direction), rtol=1e-4)


@pytest.mark.slow
def test_no_gradient_reaches_a_later_key_or_another_document() -> None:
    query, positions, ids, own = jax.tree.map(lambda leaf: leaf[0], problem(300, 1, 1, 3))

    def at(keys: jax.Array, values: jax.Array, n: int) -> jax.Array:
        return jnp.sum(attend(query, positions, ids, (replace(own, keys_KxMxE=keys, values_KxMxE=values),))[n])

    gradient = jax.jit(jax.grad(at, (0, 1)), static_argnums=2)
    for n in (5, 150, 290):
        for leaf in gradient(own.keys_KxMxE, own.values_KxMxE, n):
            reached = np.flatnonzero(np.abs(np.asarray(leaf)).sum((0, 2)))
            allowed = (ids == ids[n]) & (positions <= positions[n]) & own.valid_M
            assert set(reached) == set(np.flatnonzero(np.asarray(allowed)))


def attention_gradient() -> Callable[..., Any]:
    def one(query: jax.Array, keys: jax.Array, values: jax.Array, ids: jax.Array) -> jax.Array:
        return attend(query, ids, ids, (KeyValues(keys, values, ids, ids, ids > 0),))

    return jax.grad(lambda *args: jnp.sum(jnp.sin(jax.vmap(one)(*args))), (0, 1, 2))


def traced(tokens: int, H: int = 2) -> Any:
    float_ = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    shapes = (float_(1, tokens, H, E), *[float_(1, H, tokens, E)] * 2, jax.ShapeDtypeStruct((1, tokens), jnp.int32))
    return jax.jit(attention_gradient()).trace(*shapes)


@pytest.mark.slow
def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    few, many = (traced(tokens).lower().compile() for tokens in (1024, 16_384))
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (few, many)]
    assert temporary[1] <= 16.5 * temporary[0]
    sizes = [np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"\[([\d,]+)\]", many.as_text())]
    assert max(sizes) < 16_384**2 / 50


def test_operations_are_those_that_xla_counts_in_the_plain_products() -> None:
    float_, int_ = (
        functools.partial(lambda dtype, *shape: jnp.ones(shape, dtype), t) for t in (jnp.float32, jnp.int32)
    )
    queries = attention_whole.Queries(float_(2, 1, 3, 16, 256), int_(2, 16), int_(2, 16))
    memory = attention_whole.Memory(float_(2, 1, 24, 256), float_(2, 1, 24, 256), int_(2, 24), int_(2, 24), int_(2, 16))
    operands = jax.tree.leaves((queries, [memory]))
    forward: Any = jax.jit(lambda: attention_whole.forward(queries, [memory], None)).lower().cost_analysis()
    assert attention_flops(attention_p, operands, 1) == pytest.approx(forward["flops"], rel=0.05)
    rest = (float_(2, 1, 3, 16), float_(2, 1, 3, 16), float_(2, 1, 3, 16, 256))
    lowered = jax.jit(lambda *rest: attention_whole.gradient(queries, memory, None, *rest)).lower(*rest)
    gradient: Any = lowered.cost_analysis()
    assert attention_flops(gradient_p, operands, 1) == pytest.approx(gradient["flops"], rel=0.05)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_no_platform_has_an_array_of_all_scores(platform: str) -> None:
    lowered = traced(4096).lower(lowering_platforms=(platform,)).as_text()
    dims = re.findall(r"tensor<((?:\d+x)+)", lowered)
    sizes = [np.prod([int(n) for n in each.split("x")[:-1]]) for each in dims]
    assert max(sizes) < 4096**2

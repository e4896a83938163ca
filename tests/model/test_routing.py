"""Who a routed block computes and how rows get in and out: against loops, plain indexing and `.at[].set`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_SHIPPED
from jax.test_util import check_grads
from numpy_decoder import first_tokens, top_tokens

from mod_star.config import RoutingConfig
from mod_star.model.moves import Selection, combine, dispatch
from mod_star.model.noise import noise_threshold, position_noise
from mod_star.model.routing import (
    capacities,
    capacity_of,
    causal_slots,
    linear_router,
    routed_share,
    select_first,
    select_share,
    select_top,
)

S = 12
top = jax.jit(select_top, static_argnums=2)
first = jax.jit(select_first, static_argnums=1)


def assert_is(selection: Selection, chosen: list[int]) -> None:
    """The selection is exactly `chosen`, and its two maps are each other's inverse."""
    filled = np.asarray(selection.filled_C)
    assert np.asarray(selection.indices_C)[filled].tolist() == chosen
    assert np.flatnonzero(selection.mask_S).tolist() == chosen
    assert np.all(np.diff(selection.indices_C) >= 0), "sorted"
    slots = np.asarray(selection.slot_S)
    assert slots.min() >= 0 and slots.max() < len(filled)
    for token in chosen:
        assert filled[slots[token]] and selection.indices_C[slots[token]] == token


@pytest.mark.parametrize("capacity", [1, 5, S])
def test_select_top_equals_sorting_in_numpy(capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    for trial in range(30):
        scores = rng.normal(size=S).astype(np.float32)
        if trial % 3 == 1:
            scores = np.round(scores)  # many ties
        if trial % 3 == 2:
            scores[rng.integers(0, S, 4)] = rng.choice([np.nan, np.inf, -np.inf], 4)
        valid = rng.random(S) < rng.choice([0.0, 0.3, 0.8, 1.0])
        selection = top(scores, valid, capacity)
        chosen = top_tokens(scores, valid, capacity)
        assert len(chosen) == min(capacity, valid.sum())
        assert_is(selection, chosen)


def test_of_equal_scores_the_earlier_wins_and_a_pad_never_does() -> None:
    valid = np.arange(S) != 1
    assert_is(top(np.zeros(S, np.float32), valid, 3), [0, 2, 3])
    assert_is(top(np.full(S, -np.inf, np.float32), valid, 3), [0, 2, 3])
    assert_is(top(np.full(S, np.nan, np.float32), valid, 3), [0, 2, 3])


def test_select_first_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    for slots in (1, 4, S):
        for share in (0.0, 0.2, 0.5, 1.0):
            wanted = rng.random(S) < share
            assert_is(first(wanted, slots), first_tokens(wanted, slots))


def test_select_first_of_a_prefix_is_the_prefix_of_the_selection() -> None:
    wanted = np.random.default_rng(1).random(S) < 0.6
    whole = np.asarray(first(wanted, 4).mask_S)
    for end in range(1, S):
        changed = np.concatenate([wanted[:end], ~wanted[end:]])
        np.testing.assert_array_equal(np.asarray(first(changed, 4).mask_S)[:end], whole[:end])


def selections() -> list[Selection]:
    scores = jnp.asarray(np.random.default_rng(2).normal(size=S), jnp.float32)
    return [
        select_top(scores, jnp.ones(S, bool), 5),
        select_top(scores, jnp.arange(S) % 4 == 1, 5),  # three valid tokens for five slots
        select_first(scores > 0, 3),
        select_first(scores > 10, 3),  # nobody
    ]


def plain_dispatch(x: jax.Array, selection: Selection) -> jax.Array:
    keep = selection.filled_C.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(keep, x[selection.indices_C], 0)


def plain_combine(y: jax.Array, selection: Selection) -> jax.Array:
    """A scatter, without the selection's second map."""
    index = jnp.where(selection.filled_C, selection.indices_C, S)
    return jnp.zeros((S, *y.shape[1:]), y.dtype).at[index].set(y, mode="drop")


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.slow
def test_dispatch_and_combine_equal_indexing_and_so_do_their_gradients(number: int, shape: tuple[int, ...]) -> None:
    selection = selections()[number]
    C = selection.indices_C.shape[0]
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(S, *shape)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(C, *shape)), jnp.float32)
    for ours, plain, given, cotangent in [(dispatch, plain_dispatch, x, y), (combine, plain_combine, y, x)]:
        (value, grad), (plain_value, plain_grad) = (
            jax.jit(lambda a, ct, f=f: (f(a, selection), jax.vjp(lambda a: f(a, selection), a)[1](ct)[0]))(
                given, cotangent
            )
            for f in (ours, plain)
        )
        np.testing.assert_array_equal(value, plain_value)
        np.testing.assert_array_equal(grad, plain_grad)


def test_gradients_of_dispatch_and_combine_equal_finite_differences() -> None:
    selection = selections()[1]
    x = jnp.asarray(np.random.default_rng(4).normal(size=(S, 2)), jnp.float32)

    def through(x: jax.Array) -> jax.Array:
        return combine(jnp.sin(dispatch(x, selection)), selection) * jnp.cos(x)

    check_grads(through, (x,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def scatters_in_gradient(
    move_in: Callable[..., jax.Array], move_out: Callable[..., jax.Array], scatters: Callable[[str], list[str]]
) -> list[str]:
    """Those of a routed layer over a batch, with respect to its weights and its input, before and after XLA."""

    def one(weight: jax.Array, router: jax.Array, x: jax.Array) -> jax.Array:
        scores = linear_router({"weight": router}, x)
        selection = select_top(scores, jnp.ones(S, bool), 4)
        rows = jnp.tanh(move_in(x, selection) @ weight) * move_in(scores, selection)[:, None]
        return jnp.sum((x + move_out(rows, selection)) ** 2)

    def batch(weight: jax.Array, router: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(one, (None, None, 0))(weight, router, x))

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(6, 6), (6,), (2, S, 6)]]
    lowered = jax.jit(jax.grad(batch, (0, 1, 2))).lower(*shapes)
    return scatters(lowered.as_text()) + scatters(lowered.compile(AS_SHIPPED).as_text() or "")


@pytest.mark.slow
def test_a_routed_layer_has_no_scatter_forward_or_backward(scatters: Callable[[str], list[str]]) -> None:
    assert scatters_in_gradient(dispatch, combine, scatters) == []
    assert scatters_in_gradient(plain_dispatch, combine, scatters), "the search would not find one"
    assert scatters_in_gradient(dispatch, plain_combine, scatters), "the search would not find one"


@pytest.mark.parametrize(
    ("capacity", "count", "tokens", "expected"),
    [
        (0.125, None, 2048, 256),
        (0.125, None, 20, 3),  # 2.5, rounded up
        (0.125, None, 19, 2),
        (0.001, None, 20, 1),
        (1.0, None, 20, 20),
        (0.125, 7, 2048, 7),
        (0.125, 7, 5, 5),
    ],
)
def test_capacity_in_tokens(capacity: float, count: int | None, tokens: int, expected: int) -> None:
    assert capacity_of(RoutingConfig(capacity=capacity, capacity_tokens=count), tokens) == expected


def test_causal_slots_are_headroom_times_capacity_within_the_sequence() -> None:
    assert causal_slots(RoutingConfig(capacity=0.25, headroom=1.5), 20) == 8
    assert causal_slots(RoutingConfig(capacity=0.25, headroom=1.0), 20) == 5
    assert causal_slots(RoutingConfig(capacity=0.75, headroom=1.5), 20) == 20


def test_the_router_is_a_float32_product_whatever_the_stream_and_the_platform() -> None:
    x = jnp.asarray(np.random.default_rng(5).normal(size=(S, 6)), jnp.bfloat16)
    weight = jnp.asarray(np.random.default_rng(6).normal(size=6), jnp.float32)
    scores = linear_router({"weight": weight}, x)
    assert scores.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    # On a TPU or a GPU a float32 product is one only if it says so.
    assert "HIGHEST" in jax.jit(linear_router).lower({"weight": weight}, x).as_text()


@pytest.mark.slow
def test_stochastic_noise_is_standard_normal_by_position_and_its_threshold_routes_the_share() -> None:
    key = jax.random.key(0)
    noise = np.asarray(jax.jit(position_noise)(key, jnp.arange(4000)))
    np.testing.assert_array_equal(jax.jit(position_noise)(key, jnp.arange(100, 200)), noise[100:200])
    assert abs(noise.mean()) < 0.06 and abs(noise.std() - 1) < 0.05
    for share in (0.125, 0.5):
        routed = np.mean(noise > noise_threshold(routed_share(RoutingConfig(capacity=share), 4000)))
        assert abs(routed - share) < 4 * np.sqrt(share * (1 - share) / 4000)
    everyone = noise_threshold(routed_share(RoutingConfig(capacity=1.0), 4000))
    assert np.all(noise > everyone) and np.isfinite(everyone)


def test_a_share_is_of_the_valid_tokens_and_of_a_full_sequence_what_it_was() -> None:
    rng = np.random.default_rng(7)
    for routing in (RoutingConfig(capacity=0.125), RoutingConfig(capacity=1.0), RoutingConfig(capacity_tokens=5)):
        share = jax.jit(lambda scores, valid, routing=routing: select_share(scores, valid, routing))
        for count in (0, 1, 4, 8, 11, 12, 16, 32, 63, 64):
            scores = rng.normal(size=64).astype(np.float32)
            valid = np.isin(np.arange(64), rng.permutation(64)[:count])
            expected = min(count, 5) if routing.capacity_tokens else int(np.floor(routing.capacity * count + 0.5))
            expected = max(expected, min(count, 1))
            assert_is(share(scores, valid), top_tokens(scores, valid, expected))
        whole = top(scores, np.ones(64, bool), capacity_of(routing, 64))
        jax.tree.map(np.testing.assert_array_equal, share(scores, np.ones(64, bool)), whole)
    for capacity, tokens in ((0.1, 300), (0.3, 300), (1 / 3, 300), (0.0001, 40)):
        routing = RoutingConfig(capacity=capacity)
        assert capacities(routing, tokens).tolist() == [0, *(capacity_of(routing, n) for n in range(1, tokens + 1))]
    assert capacities(RoutingConfig(capacity_tokens=3), 5).tolist() == [0, 1, 2, 3, 3, 3]

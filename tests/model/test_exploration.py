"""Noise on the scores and tokens drawn at random, while training: against formulas of what is selected how often."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.errors import InputError
from mod_star.initial_params import init_params
from mod_star.model import Decoder
from mod_star.model.exploration import exploration_left, explored_scores, explores
from mod_star.model.parts import Part, Parts
from mod_star.model.routing import (
    RoutingCall,
    Tokens,
    linear_router_init,
    routed_block,
    rule_cross_entropy,
    select_share,
)
from mod_star.training.objectives import objective_of
from mod_star.training.objectives.next_token import forward, routing_sums

S, DRAWS = 20, 4000
SCORES = np.random.default_rng(0).normal(size=S).astype(np.float32)
VALID = np.arange(S) < 16  # 16 tokens and four pads


def shares(routing: RoutingConfig, scores: Any = SCORES, left: float = 1.0) -> np.ndarray:
    """How often each token is selected, over many keys; and that each time the capacity of the 16 is met."""

    def mask(key: jax.Array) -> jax.Array:
        ranked = explored_scores(jnp.asarray(scores), jnp.asarray(VALID), routing, jnp.float32(left), key)
        return select_share(ranked, jnp.asarray(VALID), routing).mask_S

    masks = np.asarray(jax.jit(jax.vmap(mask))(jax.random.split(jax.random.key(3), DRAWS)))
    assert not masks[:, ~VALID].any() and set(masks.sum(1)) == {round(16 * routing.capacity)}
    return masks.mean(0)[VALID]


def deviation(p: float | np.ndarray) -> Any:
    """Five standard deviations of a share of DRAWS."""
    return 5 * np.sqrt(np.maximum(p * (1 - np.asarray(p)), 1e-4) / DRAWS)


@pytest.mark.parametrize(("explore", "left"), [(0.5, 0.3), (0.1, 1.0), (1.0, 1.0)])
def test_of_the_capacity_a_share_is_drawn_uniformly_and_the_best_get_the_rest(explore: float, left: float) -> None:
    """4 of 16 tokens; the expected count of drawn ones is met, also where it is no integer."""
    mean, n = left * explore * 4, 16
    expected = np.zeros(n)
    for k, chance in ((math.floor(mean), 1 - mean % 1), (math.floor(mean) + 1, mean % 1)):
        for rank, token in enumerate(np.argsort(-SCORES[VALID])):
            # Not drawn, it is selected if so many of the better ones are drawn that fewer than 4 - k are left of them.
            among_better = [math.comb(rank, m) * math.comb(15 - rank, k - m) / math.comb(15, k) for m in range(k + 1)]
            by_score = sum(p for m, p in enumerate(among_better) if rank - m < 4 - k)
            expected[token] += chance * (k / n + (1 - k / n) * by_score)
    share = shares(RoutingConfig(capacity=0.25, explore=explore), left=left)
    np.testing.assert_array_less(np.abs(share - expected), deviation(expected))


@pytest.mark.parametrize(("noise", "left"), [(1.0, 1.0), (2.0, 0.25)])
def test_noise_is_a_multiple_of_the_scores_standard_deviation(noise: float, left: float) -> None:
    """With one slot and two tokens far above the others, the lower wins with the probability of a normal difference."""
    scores = np.full(S, -1e3, np.float32)
    scores[[2, 5]] = 400.0, 200.0
    spread = scores[VALID].astype(np.float64).std()
    share = shares(RoutingConfig(capacity=1 / 16, noise=noise), scores, left)
    sigma = noise * left * spread
    wins = 0.5 * math.erfc(200 / sigma / 2)  # P(N(0, 2 sigma^2) > 200)
    others = np.random.default_rng(0).normal(scores[VALID].astype(np.float64), sigma, (200_000, 16)).argmax(1)
    expected = np.bincount(others, minlength=16) / 200_000
    np.testing.assert_array_less(np.abs(share - expected), 1.2 * deviation(expected))
    if left < 1:  # small enough that the far ones never win
        assert abs(share[5] - wins) < deviation(wins)


def test_scores_that_are_not_numbers_do_not_spread() -> None:
    scores = SCORES.copy()
    scores[[0, 1, 2]] = np.nan, np.inf, -np.inf
    routing = RoutingConfig(capacity=0.25, noise=0.5)
    ranked = np.asarray(
        explored_scores(jnp.asarray(scores), jnp.asarray(VALID), routing, jnp.float32(1), jax.random.key(0))
    )
    assert np.isfinite(ranked[3:]).all() and (ranked[3:] != scores[3:]).all()
    nothing = explored_scores(jnp.asarray(scores), jnp.zeros(S, bool), routing, jnp.float32(1), jax.random.key(0))
    np.testing.assert_array_equal(nothing[3:], scores[3:])


def test_it_falls_linearly_or_stays() -> None:
    routing = RoutingConfig(noise=1.0, explore_steps=10)
    left: Any = [exploration_left(routing, step) for step in (0, 5, 10, 11, 10**6)]
    assert [float(each) for each in left] == pytest.approx([1, 0.5, 0, 0, 0])
    stays: Any = exploration_left(replace(routing, explore_steps=0), 10**6)
    assert float(stays) == 1
    assert exploration_left(RoutingConfig(), 0) is None
    assert not explores(RoutingConfig(every=0, noise=1.0)), "a dense model has nothing to explore"


MODEL = ModelConfig(vocab_size=11, width=8, layers=2, heads=2, mlp_width=8, context=16)
PLAIN = RoutingConfig(every=1, capacity=0.25, predictor_width=4)
RUN = RunConfig(
    MODEL, replace(PLAIN, explore=0.5, noise=0.5, explore_steps=4),
    train=TrainConfig(batch_size=3, loss_chunk=16),
)  # fmt: skip


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, 17)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (3, 16))
    ones = jnp.ones((3, 16))
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions,
        "segment_ids": ones.astype(jnp.int32), "weights": ones,
    }  # fmt: skip


@pytest.mark.slow
def test_only_training_explores_and_the_rule_learns_what_the_scores_select(batch: dict[str, jax.Array]) -> None:
    """Rows, blocks and steps draw apart; evaluation and the other pass are the programs of a run without."""
    decoder, plain = Decoder(MODEL, RUN.routing), replace(RUN, routing=PLAIN)
    params = init_params(decoder, 0)
    rows = jax.tree.map(lambda a: jnp.tile(a[:1], (3, 1)), batch)
    objective, without = objective_of(decoder, RUN), objective_of(Decoder(MODEL, PLAIN), plain)
    assert objective.takes_step and not without.takes_step
    arguments = (params, batch, jax.random.key(1))
    programs = [jax.jit(each.eval_step).lower(*arguments).as_text() for each in (objective, without)]
    assert programs[0] == programs[1]

    @jax.jit
    def trace_at(key: jax.Array, step: jax.Array) -> Any:
        return forward(decoder, params, rows, key, "top_k", exploration=exploration_left(RUN.routing, step)).trace

    trace = jax.device_get(trace_at(arguments[2], jnp.int32(0)))
    selected, by_score = np.asarray(trace.selected), np.asarray(trace.by_score)
    assert (selected.sum(-1) == 4).all() and (by_score.sum(-1) == 4).all()
    order = np.argsort(-trace.scores, -1, kind="stable")[..., :4]
    np.testing.assert_array_equal(np.sort(order, -1).ravel(), np.nonzero(by_score)[2])
    assert (selected[0, 0] != selected[1, 0]).any() and (selected[0, 0] != selected[0, 1]).any()
    again, less, none = (jax.device_get(trace_at(arguments[2], jnp.int32(step))) for step in (0, 2, 4))
    np.testing.assert_array_equal(again.selected, selected)
    assert (less.selected != selected).any() and (none.selected == none.by_score).all()
    # The causal rule's target is what the scores select, and what is routed is what was computed.
    valid = jnp.ones((3, 16), bool)
    sums = jax.device_get(jax.jit(lambda t: routing_sums(t, valid, rule_cross_entropy))(trace))
    np.testing.assert_array_equal(sums["correct"], ((trace.logits > 0) == by_score).sum((0, 2)))
    logits = np.asarray(trace.logits, np.float64)
    assert sums["trains_rule"] == pytest.approx(np.sum(np.logaddexp(0, logits) - by_score * logits), rel=1e-5)
    np.testing.assert_array_equal(sums["routed"], selected.sum((0, 2)))


def test_a_drawn_token_tells_its_score_the_first_order_benefit_of_computing_it() -> None:
    """The gradient of the loss by a score is <dL/dx', f(x)> g'(r), also where the router would have passed it by."""
    rng = np.random.default_rng(4)
    x, cotangent = (jnp.asarray(rng.normal(size=(16, 8)), jnp.float32) for _ in range(2))
    routing = replace(PLAIN, explore=1.0)
    block = jax.tree.map(lambda leaf: leaf[0], init_params(Decoder(MODEL, routing), 0)["groups"]["routed"])
    tokens = Tokens(x, jnp.arange(16, dtype=jnp.int32), jnp.ones(16, jnp.int32))

    def loss(shift_S: jax.Array) -> Any:
        shifted = Part(linear_router_init, lambda params, x: x @ params["weight"] + shift_S)
        call = RoutingCall("top_k", key=jax.random.key(0), exploration=jnp.float32(1))
        delta, _, trace, _ = routed_block(Decoder(MODEL, routing, Parts(router=shifted)), block, tokens, call)
        return jnp.sum(delta * cotangent), (delta, trace)

    gradient, (delta, trace) = jax.jit(jax.grad(loss, has_aux=True))(jnp.zeros(16))
    selected = np.asarray(trace.selected)
    assert (selected & ~np.asarray(trace.by_score)).any(), "some were drawn that the scores pass by"
    gate = 1 / (1 + np.exp(-np.asarray(trace.scores, np.float64)))
    benefit = np.sum(np.asarray(delta, np.float64) / gate[:, None] * np.asarray(cotangent, np.float64), -1)
    np.testing.assert_allclose(gradient, np.where(selected, benefit * gate * (1 - gate), 0), rtol=1e-3, atol=1e-5)
    with pytest.raises(InputError, match=r"^routing\.noise = 0\.0, routing\.explore = 1\.0: need a key$"):
        routed_block(Decoder(MODEL, routing), block, tokens, RoutingCall("top_k", exploration=jnp.float32(1)))

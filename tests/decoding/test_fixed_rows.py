"""Decoding with a fixed number of rows in each routed block: which rows pass by, and no loop that asks the host."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_models import CONTEXT, Model, lowered_advance, make_prompts
from some_nightly import some_nightly

from mod_star.decoding import GenerationConfig, Generator, Sampling
from mod_star.decoding.caches import RoutedCache
from mod_star.decoding.step import NewTokens, decode_step
from mod_star.model.rows import rows_at_once

ROWS = 12
PROMPTS = make_prompts((3,) * ROWS)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """One routed block, whose router decides, so that a row's score says whether it is routed."""
    routing = {"every": 1, "causal_rule": "router", "capacity": 3 / CONTEXT, "headroom": 4.0}
    return {kind: Model(routing | {"decoded_rows": kind}, layers=1) for kind in ("all", "fixed")}


def step(model: Model, generator: Generator, state: Any, tokens_B: Any) -> tuple[np.ndarray, RoutedCache]:
    """Hidden states and the cache after one more token of each row."""
    new = NewTokens(jnp.asarray(tokens_B), state.lengths_B, state.step, ~state.done_B)
    run = jax.jit(functools.partial(decode_step, model.decoder, branches=state.branches))
    hidden, caches = run(generator.params, state.caches, new)
    assert isinstance(caches[0], RoutedCache)
    return np.asarray(hidden), caches[0]


@pytest.mark.parametrize(
    "branches", some_nightly([1, 6, ROWS], 1, ROWS), ids=["each with a cache of its own", "of two prompts", "of one"]
)
@pytest.mark.slow
def test_the_rows_with_the_lowest_scores_pass_by(models: dict[str, Model], branches: int) -> None:
    """The others are what they are in a loop as long as it takes."""
    model = models["all"]
    generator = model.generator()
    state = generator.start(PROMPTS[: ROWS // branches], GenerationConfig(4, branches=branches))
    router = generator.params["groups"][0]["routed"]["router"]
    of_token = np.asarray(model.decoder.parts.score(router, generator.params["embedding"], model.routing))
    order = np.argsort(-of_token)
    tokens_B = np.array([order[-1] if row % 4 == 3 else order[(5 * row) % 11] for row in range(ROWS)], np.int32)
    wanted, room = of_token[tokens_B] > 0, rows_at_once(branches if branches > 1 else ROWS, 3 / CONTEXT)
    kept = np.zeros(ROWS, bool)
    for pool in np.split(np.arange(ROWS), 1 if branches == 1 else ROWS // branches):
        ranked = sorted((row for row in pool if wanted[row]), key=lambda row: (-of_token[tokens_B[row]], row))
        kept[ranked[:room]] = True
    assert 0 < kept.sum() < wanted.sum() < ROWS
    before = state.caches[0]
    assert isinstance(before, RoutedCache)
    free, free_cache = step(model, generator, state, tokens_B)
    fixed, fixed_cache = step(models["fixed"], generator, state, tokens_B)
    np.testing.assert_array_equal(free_cache.filled_B - before.filled_B, wanted)
    np.testing.assert_array_equal(fixed_cache.filled_B - before.filled_B, kept)
    np.testing.assert_array_equal(fixed_cache.overflow_B - before.overflow_B, wanted & ~kept)
    same = kept | ~wanted
    np.testing.assert_allclose(fixed[same], free[same], atol=1e-6)
    assert np.abs(fixed - free)[~same].max(1).min() > 1e-3


@pytest.mark.nightly
def test_a_gpu_asks_its_host_about_no_routed_block() -> None:
    """Of programs lowered for CUDA: the loop over tokens is the only one. Branches go by the platform alone."""
    kinds: dict[str, dict[str, Any]] = {
        "dense": {"every": 0},
        "fixed": {"every": 1, "decoded_rows": "fixed"},
        "all": {"every": 1},
    }
    asked = {}
    for kind, routing in kinds.items():
        generator = Model(routing, layers=3).generator()
        state = generator.start(PROMPTS, GenerationConfig(4))
        text = lowered_advance(generator, state, Sampling(0), ("cuda",)).as_text()
        asked[kind] = text.count("stablehlo.while")
        assert "stablehlo.if" not in text
    assert asked == {"dense": 1, "fixed": 1, "all": 1 + 3}


@pytest.mark.nightly
def test_generating_tells_what_passed_by(models: dict[str, Model]) -> None:
    generate = functools.partial(Generator.generate, prompts=PROMPTS, config=GenerationConfig(8, Sampling(1.0)))
    passed = {kind: sum(r.overflow for r in generate(model.generator())) for kind, model in models.items()}
    assert passed["all"] == 0 < passed["fixed"]

"""What a decoding step pays for: nothing for a block that is skipped, and memory for computed tokens only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_SHIPPED
from decoding_models import Model, lowered_advance, make_prompts
from some_nightly import some_nightly

from mod_star.config import ModelConfig, RoutingConfig
from mod_star.decoding import GenerationConfig, Sampling, programs
from mod_star.decoding.caches import FullCache, RoutedCache, cache_bytes
from mod_star.decoding.state import DecodeState
from mod_star.decoding.step import own_params
from mod_star.initial_params import init_params
from mod_star.model import Decoder
from mod_star.model.layers import swiglu, swiglu_init
from mod_star.model.parts import Part, Parts
from mod_star.model.routing import routed_share
from mod_star.model.rows import rows_at_once
from mod_star.model.transformer import UnstackedParams

NEW, GREEDY = 12, Sampling(0)
calls: Counter[str] = Counter()


def counted_swiglu(params: Any, x_NxD: jax.Array) -> jax.Array:
    """The default feed-forward layer, counting the rows for which it really runs."""
    rows = x_NxD.shape[0]
    jax.debug.callback(lambda _: calls.update(rows=rows), x_NxD[0, 0])
    return swiglu(params, x_NxD)


@dataclass(frozen=True)
class Step:
    """One decoding step: rows that the feed-forward layer ran for, and rows that each routed block computed."""

    rows: int
    computed: list[int]


class Counting:
    """A model of routed blocks only, whose feed-forward layers are counted."""

    def __init__(self) -> None:
        parts = Parts(feed_forward=Part(swiglu_init, counted_swiglu))
        self.model = Model({"every": 1, "headroom": 2.0}, parts)
        self.generator = self.model.generator()
        self.params = self.generator.params

    def steps(self, batch: int, shift: float = 0.0) -> Iterator[Step]:
        """Decodes step by step with `shift` added to the logit of the causal rule."""
        self.generator.params = self.params
        prompts = make_prompts((5, 9, 2, 7, 4)[:batch])
        padded = self.generator._padded(prompts, GenerationConfig(NEW), batch=batch)  # no row fills the batch up
        state = self.generator._start(padded, GenerationConfig(NEW), NEW)
        groups = tuple(
            {"routed": {**group["routed"], "predictor": {**group["routed"]["predictor"], "shift": jnp.float32(shift)}}}
            for group in self.params["groups"]
        )
        self.generator.params = UnstackedParams({**self.params, "groups": groups})
        for step in range(NEW):
            before = counts(state)
            jax.effects_barrier()
            calls.clear()
            state = self.generator.advance(state, step + 1, GREEDY)
            jax.block_until_ready(state.tokens_BxT)
            jax.effects_barrier()
            yield Step(calls["rows"], (counts(state) - before).sum(1).tolist())


def counts(state: DecodeState) -> np.ndarray:
    """Tokens in each routed block's cache, by block and row."""
    return np.array([cache.count_B for cache in state.caches if isinstance(cache, RoutedCache)])


@pytest.fixture(scope="module")
def counting() -> Counting:
    return Counting()


@pytest.mark.slow
def test_a_single_row_pays_for_the_tokens_that_it_routes(counting: Counting) -> None:
    seen = set()
    for shift in (-1e6, 1.0, 2.0, 1e6):  # none; some; more; all as long as there is room
        for step in counting.steps(1, shift):
            assert step.rows == sum(step.computed)
            seen.add(step.rows)
    assert seen == {0, 1, 2}


@pytest.mark.slow
def test_a_batch_pays_for_as_many_chunks_as_its_routed_rows_fill(counting: Counting) -> None:
    batch = 5
    chunk = rows_at_once(batch, routed_share(counting.model.decoder.routing, counting.model.decoder.config.context))
    assert chunk == 3, "the case is chosen so that some steps take two chunks"
    seen = set()
    for shift in (0.0, 1e6, -1e6):  # as it comes; all rows as long as there is room; none
        for step in counting.steps(batch, shift):
            chunks = sum(math.ceil(computed / chunk) for computed in step.computed)
            # The layer is mapped over the rows of a chunk: one call for each.
            assert step.rows == chunks * chunk
            seen.add(chunks)
    assert {0, 1, 2, 4} <= seen


def test_chunks_are_sized_by_the_capacity_in_force() -> None:
    decoder = Model({"capacity": 0.125, "capacity_tokens": 24}).decoder
    assert rows_at_once(16, routed_share(decoder.routing, decoder.config.context)) == 13
    decoder_by_share = decoder.clone(routing=replace(decoder.routing, capacity_tokens=None))
    assert rows_at_once(16, routed_share(decoder_by_share.routing, decoder_by_share.config.context)) == 4
    assert rows_at_once(2, routed_share(decoder.routing, decoder.config.context)) == 2


@pytest.mark.parametrize("every", some_nightly([0, 2], 0))
@pytest.mark.slow
def test_each_routed_block_is_a_branch_of_the_compiled_step(every: int) -> None:
    generator = Model({"every": every}, layers=4).generator()
    state = jax.eval_shape(lambda: generator.start(make_prompts((5,)), GenerationConfig(NEW)))
    lowered = lowered_advance(generator, state, GREEDY)
    assert str(lowered.compile(AS_SHIPPED).as_text()).count(" conditional(") == (2 if every else 0)


def cache_sizes(model: ModelConfig, routing: RoutingConfig, prompt: int) -> tuple[list[int], list[RoutedCache]]:
    """Bytes of each block's cache, and the routed caches' shapes, without computing anything."""
    decoder = Decoder(model, routing)
    shapes = jax.eval_shape(lambda: init_params(decoder, 0))
    new = model.context - prompt

    def prefilled(params: Any) -> DecodeState:
        tokens, rows = jnp.zeros((3, prompt), jnp.int32), jnp.arange(3, dtype=jnp.uint32)
        limits = jnp.int32(3), jnp.int32(new)
        prompts = programs.Prompts(tokens, jnp.full(3, prompt), rows, *limits, jax.random.key(0))
        return programs.prefill(
            decoder, None, own_params(decoder, params), prompts, None, size=programs.Size(prompt, new)
        )

    caches = jax.eval_shape(prefilled, shapes).caches
    assert [type(cache) for cache in caches] == [FullCache, RoutedCache] * (model.layers // 2)
    return [cache_bytes(cache) for cache in caches], [cache for cache in caches if isinstance(cache, RoutedCache)]


@pytest.mark.parametrize("prompt", [1, 64, 1000])
def test_a_routed_cache_is_a_quarter_of_a_full_one(prompt: int) -> None:
    model = ModelConfig(vocab_size=64, width=64, layers=4, heads=2, context=1024)
    sizes, routed = cache_sizes(model, RoutingConfig(), prompt)
    assert [cache.slots for cache in routed] == [192, 192]
    assert sizes[0] == sizes[2] == 3 * 2 * 64 * 1024 * 4, "keys and values of every token, in float32"
    assert sizes[1] == sizes[3] == 3 * 2 * 64 * (192 + 1) * 4
    assert sizes[1] <= 0.25 * sizes[0]


def test_slots_are_headroom_times_capacity_and_never_more_than_the_context() -> None:
    model = ModelConfig(vocab_size=64, width=16, layers=2, heads=2, context=100)
    for routing, slots in (
        (RoutingConfig(capacity=0.125, headroom=1.0), 13),
        (RoutingConfig(capacity=0.125, headroom=1.3), 17),
        (RoutingConfig(capacity_tokens=7, headroom=1.5), 11),
        (RoutingConfig(capacity=0.9, headroom=2.0), 100),
    ):
        assert cache_sizes(model, routing, 40)[1][0].slots == slots

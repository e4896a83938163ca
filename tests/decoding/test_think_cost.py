"""What thinking pays for: t + 2 tokens for a row that thinks, nothing for one that doesn't."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from decoding_models import Model, make_generator, make_prompts
from thinking_models import thinking_params

from mod_star.config import RunConfig, ThinkingConfig
from mod_star.decoding import GenerationConfig, Generator, Sampling, Think
from mod_star.model.layers import swiglu, swiglu_init
from mod_star.model.parts import Part, Parts
from mod_star.model.rows import rows_at_once

NEW, THINKING = 10, ThinkingConfig(thought_length=3, n_true=2)
PER_THOUGHT = 3 + 2  # <start>, the thought, <end>
calls: Counter[str] = Counter()


def counted_swiglu(params: Any, x_NxD: jax.Array) -> jax.Array:
    """The default feed-forward layer, counting the rows for which it really runs."""
    rows = x_NxD.shape[0]
    jax.debug.callback(lambda _: calls.update(rows=rows), x_NxD[0, 0])
    return swiglu(params, x_NxD)


@pytest.fixture(scope="module")
def generator() -> Generator:
    """One full block, whose feed-forward layer is counted."""
    parts = Parts(feed_forward=Part(swiglu_init, counted_swiglu))
    model = Model({"every": 0}, parts, layers=1, tie_embeddings=False)
    params = thinking_params(RunConfig(model=model.config, routing=model.routing), model.params)
    return make_generator(model.decoder, params, thinking=THINKING)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.slow
def test_only_rows_that_think_are_computed(generator: Generator, batch: int) -> None:
    share = 0.1
    chunk = rows_at_once(batch, share)
    state = generator.start(make_prompts((5, 9, 2, 7)[:batch]), GenerationConfig(NEW))
    seen = set()
    for step in range(NEW):
        jax.effects_barrier()
        calls.clear()
        threshold = (3.0, math.inf, -math.inf)[step % 3]
        state = generator.advance(state, step + 1, Sampling(1.0), Think("auto", threshold, share))
        jax.block_until_ready(state.tokens_BxT)
        jax.effects_barrier()
        assert state.record is not None
        thinking = int(np.sum(np.asarray(state.record.thinks_BxT)[:, step]))
        # The layer is mapped over the rows of a chunk: one call for each.
        assert calls["rows"] == batch + PER_THOUGHT * chunk * math.ceil(thinking / chunk)
        seen.add(thinking)
    assert {0, batch} <= seen

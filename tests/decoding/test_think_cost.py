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


def rows_computed(passes: list[int]) -> int:
    """Rows of all passes, told how many each row takes: of all at first, then of the smallest group that holds those
    that are left, where groups are a half and a quarter of the batch."""
    B, computed, rows = len(passes), 0, len(passes)
    for done in range(max(passes)):
        left = sum(each > done for each in passes)
        rows = min(rows, *(size for size in (B, -(-B // 2), -(-B // 4)) if size >= left))
        computed += rows
    return computed


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.slow
def test_only_rows_that_think_are_computed(generator: Generator, batch: int) -> None:
    state = generator.start(make_prompts((5, 9, 2, 7)[:batch]), GenerationConfig(NEW))
    seen = set()
    for step in range(NEW):
        jax.effects_barrier()
        calls.clear()
        threshold = (3.0, math.inf, -math.inf)[step % 3]
        state = generator.advance(state, step + 1, Sampling(1.0), Think("auto", threshold))
        jax.block_until_ready(state.tokens_BxT)
        jax.effects_barrier()
        assert state.record is not None
        thinks = np.asarray(state.record.thinks_BxT)[:, step]
        # The layer is mapped over the rows of a pass: one call for each.
        assert calls["rows"] == rows_computed([1 + PER_THOUGHT * bool(thought) for thought in thinks])
        seen.add(int(thinks.sum()))
    assert {0, batch} <= seen


@pytest.mark.slow
def test_no_row_waits_for_the_thoughts_of_another(generator: Generator) -> None:
    state = generator.start(make_prompts((5, 9, 2, 7)), GenerationConfig(NEW))
    jax.effects_barrier()
    calls.clear()
    state = generator.advance(state, NEW, Sampling(1.0), Think("auto", 3.0))
    jax.block_until_ready(state.tokens_BxT)
    jax.effects_barrier()
    assert state.record is not None
    thoughts = np.asarray(state.record.thinks_BxT)[:, :NEW].sum(1)
    assert calls["rows"] == rows_computed((NEW + PER_THOUGHT * thoughts).tolist())
    assert 0 < thoughts.min() < thoughts.max() < NEW, "rows that think more often than others"

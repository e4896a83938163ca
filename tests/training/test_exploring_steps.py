"""Training steps that explore: what they draw follows from the state alone, so that a run goes on to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.config import DataConfig, ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.model import Decoder
from mod_star.training.state import init_state
from mod_star.training.step import make_train_step

RUN = RunConfig(
    ModelConfig(vocab_size=11, width=8, layers=1, heads=1, mlp_width=8, context=16),
    RoutingConfig(every=1, predictor_width=4, capacity=0.25, noise=0.5, explore=0.5, explore_steps=2),
    optimizer=OptimizerConfig(schedule="constant", warmup_steps=0),
    train=TrainConfig(batch_size=4, accumulation=2, loss_chunk=16),
)
DECODER = Decoder(RUN.model, RUN.routing)


@pytest.mark.slow
def test_what_a_step_draws_follows_from_its_number_and_the_runs_key() -> None:
    """So sessions add up to one, whatever number of steps they were told; the portions of a batch draw apart."""
    rng = np.random.default_rng(0)
    row = jnp.asarray(rng.integers(0, 11, 17), jnp.int32)
    ones = jnp.ones((4, 16), jnp.int32)
    batch = {
        "tokens": row[:-1] * ones, "targets": row[1:] * ones, "positions": jnp.arange(16, dtype=jnp.int32) * ones,
        "segment_ids": ones, "weights": ones.astype(jnp.float32),
    }  # fmt: skip
    start = jax.eval_shape(lambda: init_state(DECODER, RUN, 3))
    few = replace(RUN.train, steps=300, seed=5, log_every=3, eval_every=1, eval_batches=2, checkpoint_every=4)
    few = replace(few, keep_checkpoints=8, max_skipped=9)
    longer = replace(RUN, data=DataConfig(pack=False, seed=3), init_from="elsewhere", train=few)
    lowered = [
        jax.jit(make_train_step(DECODER, run, steps)).lower(start, batch) for run, steps in ((RUN, 3), (longer, 300))
    ]
    # Other data and another seed neither: tests share steps by that, see shared_steps.py.
    assert lowered[0].as_text() == lowered[1].as_text(), "made longer, a run goes on as the same"
    step: Any = lowered[0].compile()
    state = jax.jit(lambda: init_state(DECODER, RUN, 3))()
    losses = [float(step(replace(state, step=jnp.int32(n)), batch)[1]["lm_loss"]) for n in (0, 0, 1, 2, 3)]
    assert losses[0] == losses[1] and len(set(losses[:4])) == 3, "every step draws its own"
    assert losses[3] == losses[4], "none draws once exploration has ended"
    assert float(step(replace(state, key=jax.random.key(9)), batch)[1]["lm_loss"]) != losses[0]
    saved = jax.device_get(step(state, batch)[0])
    chex.assert_trees_all_equal(step(jax.device_put(saved), batch)[0], step(step(state, batch)[0], batch)[0])

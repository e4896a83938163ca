"""Teaching a pretrained model of symbols to think, or going on without thoughts: its run, its first state, its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.model import Decoder
from mod_star.thinking.parameters import thinking_init
from mod_star.training.state import TrainState, init_state
from mod_star.training.step import make_train_step


def teaching_run(
    model: ModelConfig,
    routing: RoutingConfig,
    thinking: ThinkingConfig | None,
    learning_rate: float,
    train: TrainConfig,
) -> RunConfig:
    """The run of Quiet-STaR at a constant learning rate without weight decay.

    Args:
      model: of the pretrained model.
      routing: of the pretrained model.
      thinking: how it learns to think; None: it goes on with next-token training.
      learning_rate: of all steps.
      train: steps, batches and seed; its objective follows from `thinking`.
    """
    optimizer = OptimizerConfig(
        learning_rate=learning_rate, schedule="constant", warmup_steps=0, weight_decay=0.0, b2=0.999
    )
    train = replace(train, objective="quiet_star" if thinking else "next_token")
    return RunConfig(model, routing, optimizer=optimizer, train=train, thinking=thinking or ThinkingConfig())


def begin_teaching(
    run: RunConfig, params: Mapping[str, Any], first: Sequence[int], last: Sequence[int]
) -> tuple[TrainState, Callable[..., Any]]:
    """The state before the first step, and the compiled step `(state, batch) -> (state, metrics)`; it consumes states.

    Args:
      run: from `teaching_run`.
      params: of the pretrained model.
      first: symbols whose embeddings <start> begins with.
      last: those of <end>.
    """
    decoder, steps, params = Decoder(run.model, run.routing), run.train.steps, dict(params)
    if run.train.objective == "quiet_star":
        key, embedding = jax.random.key(run.train.seed + 5), jnp.asarray(params["embedding"])
        params["thinking"] = thinking_init(key, run.model, embedding, first, last, thinking=run.thinking)
    state = init_state(decoder, run, steps, params)
    return state, jax.jit(make_train_step(decoder, run, steps), donate_argnums=0)

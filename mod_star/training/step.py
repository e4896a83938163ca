"""The training step: a pure function of (state, batch), whatever the objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import RunConfig
from mod_star.model import Decoder
from mod_star.training.objectives.next_token import (
    Batch,
    Metrics,
    make_eval_step,
    make_loss,
    next_token_metrics,
    summarise_eval,
)
from mod_star.training.objectives.quiet_star import (
    make_quiet_star_eval,
    make_quiet_star_loss,
    quiet_star_metrics,
    summarise_thinking,
)
from mod_star.training.optimizer import make_optimizer, make_schedule, split_norms
from mod_star.training.state import TrainState


@dataclass(frozen=True)
class Objective:
    """What a run learns and how it is measured, as pure functions."""

    loss: Callable[..., tuple[jax.Array, Metrics]]
    """(params, batch, key, targets, valid) -> (loss, sums); additive over portions of a batch, given its totals."""
    metrics: Callable[[Metrics, jax.Array, jax.Array], Metrics]
    """(sums, targets, valid) -> metrics of a training step."""
    eval_step: Callable[[dict[str, Any], Batch, jax.Array], Metrics]
    """(params, batch, key) -> sums, to be added up over batches."""
    summarise: Callable[[dict[str, Any]], dict[str, Any]]
    """Added-up sums -> held-out metrics."""


def objective_of(decoder: Decoder, run: RunConfig) -> Objective:
    """The objective that `train.objective` names."""
    if run.train.objective == "quiet_star":
        return Objective(
            make_quiet_star_loss(decoder, run),
            quiet_star_metrics,
            make_quiet_star_eval(decoder, run),
            summarise_thinking,
        )
    return Objective(make_loss(decoder, run), next_token_metrics, make_eval_step(decoder, run), summarise_eval)


def make_train_step(
    decoder: Decoder, run: RunConfig, total_steps: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure training step `(state, batch) -> (state, metrics)`; jit it with `donate_argnums=0`.

    A batch is computed in `train.accumulation` equal portions whose gradients add up to exactly the batch's. A step
    with a non-finite loss or gradient changes neither parameters nor optimizer state, and is counted.

    It honours every field of `run` that a step depends on, and refuses what it can't: `routing.stages`, for a step has
    one capacity. How often to step, measure and save, and when to give up (`train.max_skipped`), is the caller's.

    Metrics: loss, grad_norm, learning_rate, finite (1 or 0), skipped, streak, and those of the objective.

    Raises:
      InputError: the decoder is not the one that `run` describes, or `run` has several capacities.
    """
    optimizer = make_optimizer(run, total_steps)
    schedule = make_schedule(run.optimizer, total_steps)
    objective = objective_of(decoder, run)
    gradient = jax.value_and_grad(objective.loss, has_aux=True)
    portions = run.train.accumulation

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        targets = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        valid = jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1).astype(jnp.float32)

        def portion(key: jax.Array, part: Batch) -> Any:
            (loss, sums), grads = gradient(state.params, part, key, targets, valid)
            return loss, sums, grads

        if portions == 1:
            loss, sums, grads = portion(key, batch)
        else:
            # Every portion takes some rows of every device: sequences stay where they are.
            parts = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, portions, *a.shape[1:]), 0, 1), batch)
            keys = jax.random.split(key, portions)
            zeros = jax.tree.map(
                lambda a: jnp.zeros(a.shape, a.dtype),
                jax.eval_shape(portion, key, jax.tree.map(lambda a: a[0], parts)),
            )
            accumulate = lambda total, xs: (jax.tree.map(jnp.add, total, portion(*xs)), None)  # noqa: E731
            (loss, sums, grads), _ = jax.lax.scan(accumulate, zeros, (keys, parts))

        grad_norm, predictor_norm = split_norms(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(predictor_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        params = jax.tree.map(lambda p, u: keep(p + u, p), state.params, updates)
        opt_state = jax.tree.map(keep, opt_state, state.opt_state)
        skipped = state.skipped + ~finite
        streak = jnp.where(finite, 0, state.streak + 1)
        applied = state.step - state.skipped
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(applied), jnp.float32),
            "finite": finite.astype(jnp.float32),
            "skipped": skipped.astype(jnp.float32),
            "streak": streak.astype(jnp.float32),
        }
        metrics |= objective.metrics(sums, targets, valid)
        return TrainState(state.step + 1, params, opt_state, state.key, skipped, streak), metrics

    return train_step

"""The training step: a pure function of (state, batch), whatever the objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import RunConfig
from mod_star.model import Decoder
from mod_star.trainable import trained_part, with_trained_part
from mod_star.training.objectives import Batch, Metrics, Objective, objective_of
from mod_star.training.objectives.objective import with_adapted_params
from mod_star.training.optimizer import make_schedule, optimizer_of, split_norms
from mod_star.training.state import TrainState

__all__ = ["Batch", "Metrics", "Objective", "make_train_step", "objective_of"]


def make_train_step(
    decoder: Decoder, run: RunConfig, total_steps: int, objective: Objective | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The pure training step `(state, batch, *frozen) -> (state, metrics)`; jit it with `donate_argnums=0`.

    `frozen` are the arrays `Objective.frozen`; those that are left out become constants of the program.

    A batch is computed in `train.accumulation` equal portions whose gradients add up to exactly the batch's. A step
    with a non-finite loss or gradient changes neither parameters nor optimizer state, and is counted. Parameters that
    `train.trainable` leaves out are frozen: nothing is differentiated with respect to them, and they stay as they are.

    It honours every field of `run` that a step depends on, and refuses what it can't: `routing.stages`, for a step has
    one capacity. How often to step, measure and save, and when to give up (`train.max_skipped`), is the caller's.

    Metrics: loss, grad_norm (of what is trained), learning_rate (of the built-in optimizer), finite (1 or 0), skipped,
    streak, and those of the objective, `objective_of(decoder, run)` unless one is given.

    Raises:
      InputError: the decoder is not the one that `run` describes, or `run` has several capacities; when it is traced:
        a user's part gives an array of another shape or type, or a pattern of `train.trainable` matches nothing.
    """
    optimizer = optimizer_of(decoder.parts, run, total_steps)
    schedule = make_schedule(run.optimizer, total_steps) if decoder.parts.optimizer is None else None
    objective = objective_of(decoder, run) if objective is None else with_adapted_params(objective, run)
    portions = run.train.accumulation

    def train_step(state: TrainState, batch: Batch, *frozen: Any) -> tuple[TrainState, Metrics]:
        frozen = frozen or objective.frozen
        key = jax.random.fold_in(state.key, state.step)
        targets = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        valid = jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1).astype(jnp.float32)
        trained = trained_part(run, state.params)

        progress = {"step": state.step} if objective.takes_step else {}

        def portion(key: jax.Array, part: Batch) -> Any:
            def loss_of(trained: Any) -> tuple[jax.Array, Metrics]:
                params = with_trained_part(run, state.params, trained)
                return objective.loss(params, part, key, targets, valid, *frozen, **progress)

            (loss, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
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
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        params = with_trained_part(run, state.params, jax.tree.map(lambda p, u: keep(p + u, p), trained, updates))
        opt_state = jax.tree.map(keep, opt_state, state.opt_state)
        skipped = state.skipped + ~finite
        streak = jnp.where(finite, 0, state.streak + 1)
        applied = state.step - state.skipped
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            **({} if schedule is None else {"learning_rate": jnp.asarray(schedule(applied), jnp.float32)}),
            "finite": finite.astype(jnp.float32),
            "skipped": skipped.astype(jnp.float32),
            "streak": streak.astype(jnp.float32),
        }
        metrics |= objective.metrics(sums, targets, valid)
        return TrainState(state.step + 1, params, opt_state, state.key, skipped, streak), metrics

    return train_step

"""AdamW with decoupled decay, a learning-rate schedule, and clipping that keeps the predictor apart.

`mod_star.Parts.optimizer` replaces the whole; the pieces are there for it to use. Every leaf of its state lies where
the rules of `mod_star.distributed.sharding` put it: by its path, else along its largest dimension.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mod_star.config import OptimizerConfig, RunConfig
from mod_star.errors import InputError
from mod_star.model.parts import Parts, require_same_structure
from mod_star.trainable import path_names


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up, then cosine, warm-up-stable-decay or constant."""
    warmup = min(config.warmup_steps, total_steps // 2)
    rest = max(1, total_steps - warmup)
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    after: optax.Schedule
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    elif config.schedule == "wsd":
        decay = max(1, round(rest * config.decay_fraction))
        after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    else:
        after = optax.constant_schedule(peak)
    # Step 0 already moves: the warm-up goes from peak / warmup to peak.
    rising = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([rising, after], [warmup])


PREDICTORS = {"predictor", "decider"}
"""Names of parameters that learn from the language model what it does, and that it learns nothing from."""


def decay_mask(params: Any) -> Any:
    """True for leaves that are decayed: matrices, except in routers, predictors and the decider.

    Blocks are stacked over groups. A bias of several heads is no matrix.
    """

    def decayed(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        names = path_names(path)
        if {"router", *PREDICTORS} & {*names} or names[-1].endswith("_bias"):
            return False
        return leaf.ndim - (names[0] == "groups") >= 2

    return jax.tree_util.tree_map_with_path(decayed, params)


def predictor_mask(params: Any) -> Any:
    """True for the leaves of causal predictors and the decider, which do not belong to the language model."""
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(PREDICTORS & {*path_names(path)}), params)


def split_norms(grads: Any) -> tuple[jax.Array, jax.Array]:
    """Global gradient norms of the language model and of the predictors, float32."""
    mask = predictor_mask(grads)
    squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g.astype(jnp.float32))), grads)
    sums = [jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)]
    for is_predictor, square in zip(jax.tree.leaves(mask), jax.tree.leaves(squares), strict=True):
        sums[is_predictor] += square
    return jnp.sqrt(sums[0]), jnp.sqrt(sums[1])


def clip_apart(limit: float) -> optax.GradientTransformation:
    """Clips the global norm of the language model's gradients and of the predictors' to `limit`, each on its own.

    Clipped together, a large predictor gradient would shrink the language model's step, and the auxiliary predictor
    would no longer be free of cost to the LM objective (Mixture-of-Depths, section 3.5).
    """

    def update(grads: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        scales = [jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30)) for norm in split_norms(grads)]
        return jax.tree.map(lambda g, is_predictor: g * scales[is_predictor], grads, predictor_mask(grads)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_thought_embeddings(factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of <start> and <end>: their learning rate, as a multiple of the others'."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params

        def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
            return update * factor if path_names(path) in (("thinking", "start"), ("thinking", "end")) else update

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(run: RunConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101): decay is added after Adam's scaling, times the rate."""
    config = run.optimizer
    return optax.chain(
        clip_apart(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        scale_thought_embeddings(run.thinking.embedding_rate),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )


def optimizer_of(parts: Parts, run: RunConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimizer in force: the parts' own, or AdamW.

    A user's is checked as it is traced: updates as the parameters, and a state that keeps its shapes and types.

    Raises:
      InputError: a user's function gives something else.
    """
    if parts.optimizer is None:
        return make_optimizer(run, total_steps)
    optimizer = parts.optimizer(run, total_steps)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise InputError(f"parts.optimizer = {type(optimizer).__name__}: must return an optax.GradientTransformation")

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new_state = optimizer.update(grads, state, params)
        require_same_structure("optimizer updates", updates, params)
        return updates, require_same_structure("optimizer state", new_state, state)

    return optax.GradientTransformation(optimizer.init, update)

"""What training carries from step to step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mod_star.config import RunConfig
from mod_star.model import Decoder
from mod_star.training.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """A pytree; everything that a checkpoint must hold besides the data iterator's state."""

    step: jax.Array
    """int32 number of batches consumed."""
    params: dict[str, Any]
    """float32 parameters."""
    opt_state: optax.OptState
    key: jax.Array
    """Typed random key of the run; a step's keys are folded from it and `step`."""
    skipped: jax.Array
    """int32 number of steps skipped because loss or gradient was not finite."""
    streak: jax.Array
    """int32 number of such steps in a row up to now."""


def init_params(decoder: Decoder, seed: int) -> dict[str, Any]:
    """Initial float32 parameters, a plain nested dict."""
    tokens_S = jnp.zeros(2, jnp.int32)
    return decoder.init(jax.random.key(seed), tokens_S, key=jax.random.key(0))["params"]


def init_state(decoder: Decoder, run: RunConfig, total_steps: int) -> TrainState:
    """The state before the first step; jit-able, so that large parameters can be made in place."""
    params = init_params(decoder, run.train.seed)
    opt_state = make_optimizer(run.optimizer, total_steps).init(params)
    key = jax.random.fold_in(jax.random.key(run.train.seed), 1)
    # Three arrays, not one: a donated buffer may appear once only.
    step, skipped, streak = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, opt_state, key, skipped, streak)

"""What training carries from step to step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mod_star import random_streams
from mod_star.config import RunConfig
from mod_star.initial_params import init_params
from mod_star.model import Decoder
from mod_star.model.transformer import StackedParams
from mod_star.trainable import trained_part
from mod_star.training.optimizer import optimizer_of


@struct.dataclass
class TrainState:
    """A pytree; everything that a checkpoint must hold besides the data iterator's state."""

    step: jax.Array
    """int32 number of batches consumed."""
    params: StackedParams
    """float32 parameters."""
    opt_state: optax.OptState
    """Of the parameters that are trained (`mod_star.trainable`)."""
    key: jax.Array
    """Typed random key of the run; a step's keys are folded from it and `step`."""
    skipped: jax.Array
    """int32 number of steps skipped because loss or gradient was not finite."""
    streak: jax.Array
    """int32 number of such steps in a row up to now."""


def init_state(decoder: Decoder, run: RunConfig, total_steps: int, params: dict[str, Any] | None = None) -> TrainState:
    """The state before the first step; jit-able, so that large parameters can be made in place.

    Args:
      decoder: makes the parameters.
      run: its `optimizer`, `train.trainable`, and `train.seed` for parameters and key.
      total_steps: length of the learning-rate schedule.
      params: float32 parameters to start from, see `initial_params`; None: the decoder's own, random.

    Raises:
      InputError: a pattern of `train.trainable` matches no parameter.
    """
    params = init_params(decoder, run.train.seed) if params is None else params
    opt_state = optimizer_of(decoder.parts, run, total_steps).init(trained_part(run, params))
    key = jax.random.fold_in(jax.random.key(run.train.seed), random_streams.TRAINING)
    # Three arrays, not one: a donated buffer may appear once only.
    step, skipped, streak = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, opt_state, key, skipped, streak)

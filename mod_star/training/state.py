"""What training carries from step to step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mod_star import random_streams
from mod_star.config import RunConfig
from mod_star.data import Tokenizer
from mod_star.model import Decoder
from mod_star.thinking.parameters import thinking_init
from mod_star.training.optimizer import optimizer_of


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


def initial_params(
    decoder: Decoder, run: RunConfig, tokenizer: Tokenizer, base: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a run starts with: the decoder's parameters and, if it is to think, those of `mod_star.thinking`.

    Args:
      decoder: makes the parameters.
      run: its objective, its thinking and its seed.
      tokenizer: spells the texts that <start> and <end> begin as.
      base: parameters of another run to start from; None: random ones. Its thinking is kept if it has learned any, and
        left out where the objective does not need it.
    """
    params = init_params(decoder, run.train.seed) if base is None else base
    if not run.thinks:
        return {name: value for name, value in params.items() if name != "thinking"}
    if "thinking" in params:
        return params
    key = jax.random.fold_in(jax.random.key(run.train.seed), random_streams.THINKING_PARAMETERS)
    start, end = (tokenizer.encode(text) for text in (run.thinking.start_text, run.thinking.end_text))
    return {**params, "thinking": thinking_init(key, run.model, params["embedding"], start, end, decoder.parts)}


def init_state(decoder: Decoder, run: RunConfig, total_steps: int, params: dict[str, Any] | None = None) -> TrainState:
    """The state before the first step; jit-able, so that large parameters can be made in place.

    Args:
      decoder: makes the parameters.
      run: its `optimizer`, and `train.seed` for parameters and key.
      total_steps: length of the learning-rate schedule.
      params: float32 parameters to start from, see `initial_params`; None: the decoder's own, random.
    """
    params = init_params(decoder, run.train.seed) if params is None else params
    opt_state = optimizer_of(decoder.parts, run, total_steps).init(params)
    key = jax.random.fold_in(jax.random.key(run.train.seed), random_streams.TRAINING)
    # Three arrays, not one: a donated buffer may appear once only.
    step, skipped, streak = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, opt_state, key, skipped, streak)

"""A run's parameters before training, and their shapes: the decoder's, and those that thinking needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mod_star import random_streams
from mod_star.config import RunConfig
from mod_star.model import Decoder
from mod_star.thinking.parameters import new_decider, thinking_init

if TYPE_CHECKING:
    from mod_star.tokenization import Tokenizer


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
    key = jax.random.fold_in(jax.random.key(run.train.seed), random_streams.THINKING_PARAMETERS)
    if "thinking" in params:  # which may have been learned without a decider
        own, width = params["thinking"], run.thinking.decider_width
        if width and "decider" not in own:
            own = {**own, "decider": new_decider(key, run.model, width)}
        return {**params, "thinking": own}
    start, end = (tokenizer.encode(text) for text in (run.thinking.start_text, run.thinking.end_text))
    own = thinking_init(key, run.model, params["embedding"], start, end, decoder.parts, run.thinking)
    return {**params, "thinking": own}

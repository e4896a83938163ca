"""A run's parameters before training, and their shapes: the decoder's, and those that thinking needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mod_star import random_streams
from mod_star.config import RunConfig
from mod_star.model import Decoder
from mod_star.model.lora import lora_init, require_merged
from mod_star.thinking.parameters import new_decider, thinking_init

if TYPE_CHECKING:
    from mod_star.tokenization import Tokenizer


def init_params(decoder: Decoder, seed: int) -> dict[str, Any]:
    """Initial float32 parameters, a plain nested dict."""
    # `setup` makes all of them; the whole network, called after it, would be traced for nothing.
    return decoder.init(jax.random.key(seed), jnp.zeros(2, jnp.int32), method=Decoder.embed)["params"]


def initial_params(
    decoder: Decoder, run: RunConfig, tokenizer: Tokenizer, base: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a run starts with: the decoder's parameters, those of thinking if it is to think, adapters if it has any.

    Args:
      decoder: makes the parameters.
      run: its objective, its thinking, its adapters and its seed.
      tokenizer: spells the texts that <start> and <end> begin as.
      base: parameters of another run to start from; None: random ones. Its thinking is kept if it has learned any, and
        left out where the objective does not need it. Adapters are merged into it.

    Raises:
      InputError: a target of `lora.targets` matches nothing, or the base's adapters are not merged.
    """
    params = init_params(decoder, run.train.seed) if base is None else base
    require_merged(params)
    seed = jax.random.key(run.train.seed)
    if not run.thinks:
        params = {name: value for name, value in params.items() if name != "thinking"}
    else:
        key = jax.random.fold_in(seed, random_streams.THINKING_PARAMETERS)
        params = {**params, "thinking": _thinking_params(decoder, run, tokenizer, params, key)}
    if run.lora.rank:
        key = jax.random.fold_in(seed, random_streams.ADAPTERS)
        params = {**params, "lora": lora_init(key, run.lora, params)}
    return params


def _thinking_params(
    decoder: Decoder, run: RunConfig, tokenizer: Tokenizer, params: dict[str, Any], key: jax.Array
) -> dict[str, Any]:
    """Those that have been learned, perhaps without a decider, or new ones."""
    if "thinking" in params:
        own, width = params["thinking"], run.thinking.decider_width
        if width and "decider" not in own:
            own = {**own, "decider": new_decider(key, run.model, width)}
        return dict(own)
    start, end = (tokenizer.encode(text) for text in (run.thinking.start_text, run.thinking.end_text))
    return thinking_init(key, run.model, params["embedding"], start, end, decoder.parts, run.thinking)

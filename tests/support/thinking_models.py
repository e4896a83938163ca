"""A tiny thinking model with its batch, and what it does with it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mod_star.config import RunConfig
from mod_star.model import Decoder, Output
from mod_star.model.parts import DEFAULT_PARTS, Parts
from mod_star.model.transformer import head_matrix
from mod_star.thinking.objective import Places, Talk, choose_places, sample_thoughts, talk_loss
from mod_star.thinking.sample import ThinkingDecoder
from mod_star.thinking.thought import Thought
from mod_star.training.objectives.next_token import forward

Batch = dict[str, jax.Array]


def thinking_params(run: RunConfig, params: Any, seed: int = 0) -> Any:
    """`params` with random <start>, <end> and mixing head (its last layer too)."""
    rng = np.random.default_rng(seed + 100)
    D = run.model.width
    normal = lambda *shape, scale=0.3: jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)  # noqa: E731
    mixing = {
        "first": normal(2 * D, D), "first_bias": normal(D), "second": normal(D, D), "second_bias": normal(D),
        "output": normal(D), "output_bias": normal(),
    }  # fmt: skip
    return {**params, "thinking": {"start": normal(D, scale=1.0), "end": normal(D, scale=1.0), "mixing": mixing}}


@dataclass(frozen=True)
class Thinker:
    """A model with its batch; what a pass over the text, sampling and scoring give."""

    run: RunConfig
    params: Any
    batch: Batch
    parts: Parts = DEFAULT_PARTS

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.run.model, self.run.routing, self.parts)

    @property
    def thinks(self) -> ThinkingDecoder:
        return ThinkingDecoder(self.decoder, self.run.thinking)

    def read(self, params: Any) -> Output:
        return forward(self.decoder, params, self.batch, None, "causal", keep_keys_values=True)

    def think(self, params: Any, key: jax.Array, temperature: float = 1.0) -> tuple[Places, Thought]:
        text = self.read(params)
        places = choose_places(self.thinks, self.batch, text, head_matrix(params), key, 10)
        return places, sample_thoughts(self.thinks, params, text, self.batch, places, key, temperature)

    def score(self, params: Any, places: Places, thoughts: Thought) -> tuple[jax.Array, Talk]:
        text = self.read(params)
        return talk_loss(self.thinks, params, text, self.batch, places, thoughts, 10)


@functools.cache
def thinks(run: RunConfig) -> Any:
    """`(params, batch, key) -> places, thoughts` at temperature 1, compiled once for all tests; arrays of NumPy."""
    return _compiled(lambda params, batch, key: Thinker(run, params, batch).think(params, key))


@functools.cache
def scores(run: RunConfig) -> Any:
    """`(params, batch, places, thoughts) -> loss, talk`, compiled once for all tests; arrays of NumPy."""
    return _compiled(lambda params, batch, *thought: Thinker(run, params, batch).score(params, *thought))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled, with results that tests can pick from as they like: JAX compiles a program for each new shape."""
    program = jax.jit(function)
    return lambda *args: jax.device_get(program(*args))

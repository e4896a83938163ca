"""How many files of the package one training step, one decode step and one thought run through.

    python -m experiments.benchmarks.files_to_open

Counts the files of mod_star whose functions run while each is traced and lowered: what a stranger opens to follow it.
The model is tiny and routed. A training step is of next-token prediction; a decode step is one turn of generation's
loop; a thought is sampled after one place of a text and scored, mixed and learned from, with its gradient.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import mod_star
from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.decoding import Sampling, Think, programs
from mod_star.decoding.step import own_params
from mod_star.initial_params import initial_params
from mod_star.model import Decoder
from mod_star.model.transformer import head_matrix
from mod_star.thinking.objective import choose_places, sample_thoughts, talk_loss
from mod_star.thinking.sample import ThinkingDecoder
from mod_star.tokenization import ByteTokenizer
from mod_star.training.objectives.next_token import forward
from mod_star.training.state import init_state
from mod_star.training.step import make_train_step

PACKAGE = Path(mod_star.__file__).parent
B, S = 2, 16
RUN = RunConfig(
    ModelConfig(vocab_size=258, width=8, layers=2, heads=2, mlp_width=8, context=S),
    RoutingConfig(capacity=0.5, predictor_width=4),
    train=TrainConfig(batch_size=B, loss_chunk=S),
    thinking=ThinkingConfig(thought_length=2, n_true=2, chunk=4),
)


def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """Of an array."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def files_of(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Files of the package whose functions run while `function` is traced and lowered, as they come."""
    seen: dict[str, None] = {}
    sys.setprofile(lambda frame, event, argument: seen.setdefault(frame.f_code.co_filename))
    try:
        jax.jit(function).lower(*arguments)
    finally:
        sys.setprofile(None)
    return [str(Path(name).relative_to(PACKAGE)) for name in seen if Path(name).is_relative_to(PACKAGE)]


def training_step() -> list[str]:
    """Of a step of next-token prediction."""
    decoder = Decoder(RUN.model, RUN.routing)
    state = jax.eval_shape(lambda: init_state(decoder, RUN, 10, initial_params(decoder, RUN, ByteTokenizer())))
    return files_of(make_train_step(decoder, RUN, 10), state, batch_shapes())


def decode_step() -> list[str]:
    """Of a turn of generation's loop."""
    decoder, key = Decoder(RUN.model, RUN.routing), jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda: own_params(decoder, initial_params(decoder, RUN, ByteTokenizer())))
    prompts = programs.Prompts(shape(B, 8), shape(B), shape(B, dtype=jnp.uint32), shape(), shape(), key)
    prefill = functools.partial(programs.prefill, decoder, None, size=programs.Size(8, room=4))
    state = jax.eval_shape(lambda params, prompts: prefill(params, prompts, None), params, prompts)
    number = shape(dtype=jnp.float32)
    bounds = programs.Bounds(shape(), number, number, number, number, shape(2))

    def advance(*data: Any) -> Any:
        return programs.advance_program().__wrapped__(
            decoder, None, *data, None, sampling=Sampling(1.0), think=Think()
        )  # fmt: skip

    return files_of(advance, params, state, bounds)


def thought() -> list[str]:
    """Of thoughts after the places of a text, sampled, scored, mixed and learned from."""
    run = replace(RUN, train=replace(RUN.train, objective="quiet_star"))
    decoder = Decoder(run.model, run.routing)
    thinker = ThinkingDecoder(decoder, run.thinking)
    params, key = jax.eval_shape(lambda: initial_params(decoder, run, ByteTokenizer())), jax.random.key(0)
    batch = batch_shapes()

    def read(params: Any, batch: Any) -> Any:
        return forward(decoder, params, batch, None, keep_keys_values=True)

    text = jax.eval_shape(read, params, batch)

    def learn(params: Any, text: Any, batch: Any) -> Any:
        places = choose_places(thinker, batch, text, head_matrix(params), key, S)
        thoughts = sample_thoughts(thinker, params, text, batch, places, key, 1.0)
        return jax.grad(lambda params: talk_loss(thinker, params, text, batch, places, thoughts, S)[0])(params)

    return files_of(learn, params, text, batch)


def batch_shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """Of a batch."""
    ids = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), shape(B, S))
    return {**ids, "weights": shape(B, S, dtype=jnp.float32)}


def main() -> None:
    """Counts and prints."""
    for what in (training_step, decode_step, thought):
        names = what()
        print(f"{what.__name__.replace('_', ' ')}: {len(names)} files: {', '.join(names)}")


if __name__ == "__main__":
    main()

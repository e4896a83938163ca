"""A training step on random tokens, as benchmarks time it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from experiments.support.pretraining import symbol_batch
from mod_star.config import RunConfig
from mod_star.model import Decoder
from mod_star.training.state import init_state
from mod_star.training.step import make_train_step


def compiled_step(run: RunConfig) -> tuple[Callable[[], Any], Any]:
    """A function that does one training step and gives its metrics, and the program that it runs."""
    decoder = Decoder(run.model, run.routing)
    state = jax.jit(lambda: init_state(decoder, run, 100))()
    shape = (run.train.batch_size, run.model.context + 1)
    batch = symbol_batch(jax.device_get(jax.random.randint(jax.random.key(1), shape, 0, run.model.vocab_size)))
    step = jax.jit(make_train_step(decoder, run, 100), donate_argnums=0).lower(state, batch).compile()

    def train_once() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return train_once, step

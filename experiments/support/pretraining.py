"""What the composition experiments share: batches of symbols, and a small model that is taught them once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import from_bytes, to_bytes
from rich.progress import track

from experiments.support.reporting import write_aside
from mod_star.config import ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.initial_params import init_params
from mod_star.model import Decoder
from mod_star.training.state import init_state
from mod_star.training.step import make_train_step

DENSE = RoutingConfig(every=0)


def symbol_batch(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Rows of S + 1 symbols as a batch of sequences of S, in the form of `mod_star.data`'s batches."""
    symbols = np.array(rows, np.int32)
    shape = (symbols.shape[0], symbols.shape[1] - 1)
    return {
        "tokens": jnp.asarray(symbols[:, :-1]),
        "targets": jnp.asarray(symbols[:, 1:]),
        "positions": jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "weights": jnp.ones(shape, jnp.float32),
    }


def cut_from_lines(next_line: Callable[[], list[int]], sequences: int, length: int) -> dict[str, Any]:
    """A batch of sequences of `length` symbols, each cut from lines set end to end."""
    rows = []
    for _ in range(sequences):
        row: list[int] = []
        while len(row) <= length:
            row += next_line()
        rows.append(row[: length + 1])
    return symbol_batch(rows)


def pretrained(
    path: Path,
    model: ModelConfig,
    steps: int,
    batch_size: int,
    seed: int,
    title: str,
    make_batch: Callable[[np.random.Generator], dict[str, Any]],
    routing: RoutingConfig = DENSE,
) -> dict[str, Any]:
    """Parameters of a small model: those that are in the file `path`, or else trained and written there.

    Args:
      path: a .msgpack file.
      model: sizes; its context is the length of the sequences.
      steps: of training.
      batch_size: of the batches that `make_batch` makes.
      seed: of the parameters and of the batches.
      title: of the progress bar.
      make_batch: the next batch.
      routing: of the model; dense by default.
    """
    decoder = Decoder(model, routing)
    if path.exists():
        params: dict[str, Any] = from_bytes(jax.eval_shape(lambda: init_params(decoder, seed)), path.read_bytes())
        return params
    run = RunConfig(
        model, routing,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, weight_decay=0.01, final_fraction=0.03),
        train=TrainConfig(steps=steps, batch_size=batch_size, loss_chunk=model.context, seed=seed),
    )  # fmt: skip
    step = jax.jit(make_train_step(decoder, run, steps), donate_argnums=0)
    state = init_state(decoder, run, steps)
    rng = np.random.default_rng(seed)
    for _ in track(range(steps), title):
        state, _ = step(state, make_batch(rng))
    write_aside(path, to_bytes(state.params))
    trained: dict[str, Any] = jax.device_get(state.params)
    return trained

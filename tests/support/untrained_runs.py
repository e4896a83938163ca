"""Runs that nobody has trained: directories with a checkpoint, as training leaves them, in a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from mod_star.config import RunConfig
from mod_star.initial_params import initial_params
from mod_star.model import Decoder
from mod_star.runs import directory
from mod_star.runs.base_run import load_base
from mod_star.runs.checkpoints import CheckpointWriter
from mod_star.tokenization import Tokenizer
from mod_star.training.state import init_state


def write_run(
    path: Path, run: RunConfig, tokenizer: Tokenizer, params: Any, step: int, base: RunConfig | None = None
) -> Path:
    """Writes a run whose only checkpoint, after `step` steps, has these parameters; `base`: as for `created`."""
    with directory.created(path, run, tokenizer, base):
        pass
    state = jax.jit(lambda params: init_state(Decoder(run.model, run.routing), run, 9, params))(params)
    writer = CheckpointWriter(path / "checkpoints", 3)
    batches = iter(grain.MapDataset.range(9).to_iter_dataset())
    writer.save(replace(state, step=state.step + step), batches, {"seconds": 0.0})
    writer.close()
    return path


def write_thinking_run(path: Path, run: RunConfig) -> Path:
    """Writes a run that thinks, as after all of its steps: the parameters of `run.init_from`, and random thoughts.

    All that belongs to thinking is random, so that thoughts matter, and a decider finds some of them worth it.
    """
    base = load_base(run)
    assert base is not None
    decoder, rng = Decoder(run.model, run.routing), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: initial_params(decoder, run, base.tokenizer, base.params))["thinking"]
    thinking = jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
    params = {**base.params, "thinking": thinking}
    return write_run(path, run, base.tokenizer, params, run.train.steps, base.config)

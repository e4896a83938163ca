"""The inputs of a run: read and checked before anything is compiled or written."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import grain
import jax
from jax.sharding import Mesh

from mod_star.config import RunConfig
from mod_star.data import Batch, held_out_batches, train_batches
from mod_star.data.identity import Identity, fingerprint, identify
from mod_star.distributed.processes import gather
from mod_star.distributed.sharding import require_fits, rows_of_process
from mod_star.errors import InputError
from mod_star.initial_params import initial_params
from mod_star.model import Decoder
from mod_star.parts import load_parts
from mod_star.runs.directory import require_vocabulary
from mod_star.stages import StagePlan, plan_stages
from mod_star.tokenization import Tokenizer
from mod_star.trainable import trained_paths, trains_all


@dataclass(frozen=True)
class Inputs:
    """What a run is made from, checked and ready."""

    run: RunConfig
    """With `model.vocab_size` filled in."""
    tokenizer: Tokenizer
    decoder: Decoder
    batches: grain.IterDataset
    """Of this process's rows of every batch."""
    held_out: list[Batch]
    """Whole batches, the same in every process."""
    data: Identity
    """Of what the batches are made from."""
    plan: StagePlan
    mesh: Mesh | None
    """None: one device."""
    notes: tuple[str, ...]
    """What is read otherwise than one may think, a line each."""


def load_inputs(run: RunConfig, tokenizer: Tokenizer, mesh: Mesh | None) -> Inputs:
    """Reads and checks everything that a run is made from.

    Args:
      run: its configuration; `model.vocab_size` 0 becomes the tokenizer's, rounded up to a multiple of 64.
      tokenizer: the run's.
      mesh: its devices; None: one.

    Raises:
      InputError: a field, the data or the parts are wrong, or the mesh doesn't fit.
    """
    parts = load_parts(run.parts)
    if run.model.vocab_size == 0:
        run = replace(run, model=replace(run.model, vocab_size=64 * math.ceil(tokenizer.vocab_size / 64)))
    require_vocabulary(run, tokenizer)
    plan = plan_stages(run)
    rows = None
    if mesh is not None:
        require_fits(run, mesh)
        rows = rows_of_process(mesh, run.train.batch_size)
    source = (run.data, tokenizer, run.model.context, run.train.batch_size)
    notes: list[str] = []
    batches = train_batches(*source, rows, notes.append)
    next(iter(batches))  # a document that cannot be read or tokenised comes to light now, not after compilation
    held_out = list(itertools.islice(held_out_batches(*source), run.train.eval_batches))
    data = identify(run.data, batches.documents)
    if len(set(gather(fingerprint(data)))) > 1:
        raise InputError(f"data.source = {run.data.source!r}: is not the same in all processes")
    decoder = Decoder(run.model, run.routing, parts)
    if not trains_all(run):  # a pattern that matches nothing comes to light now, not when the step is traced
        trained_paths(run, jax.eval_shape(lambda: initial_params(decoder, run, tokenizer)))
    return Inputs(run, tokenizer, decoder, batches, held_out, data, plan, mesh, tuple(notes))

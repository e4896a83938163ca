"""Where a run's configuration and a decoder must agree, before one is used with the other.

The loop makes both from one configuration. A library call gets them apart, and would pass over what differs in silence.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from mod_star.config import RunConfig, require_thinkable
from mod_star.errors import InputError, require
from mod_star.model import Decoder
from mod_star.model.parts import DEFAULT_PARTS


def require_agreement(decoder: Decoder, run: RunConfig) -> None:
    """Raises InputError unless the decoder is the one that `run` describes, at a single capacity.

    `model.vocab_size` may be 0 in the run, which means that of the tokenizer.
    """
    if run.routing.every and run.routing.stages:
        raise InputError(
            f"routing.stages = {run.routing.stages}: a step or a loss is of one capacity; make one for each of "
            "mod_star.stages.plan_stages(run).stages, with Decoder(stage.run.model, stage.run.routing) and "
            "stage.run"
        )
    model = run.model
    if model.vocab_size == 0:
        model = replace(model, vocab_size=decoder.config.vocab_size)
    _require_same("model", decoder.config, model)
    _require_same("routing", decoder.routing, run.routing)
    own = run.parts is None or decoder.parts is not DEFAULT_PARTS  # a file's may equal the built-in ones
    require(own, "parts", run.parts, "must be None, or the decoder's: Decoder(model, routing, load_parts(run.parts))")


def require_thinker(decoder: Decoder, run: RunConfig) -> None:
    """`require_agreement`, and that the model can learn to think, whatever `train.objective` is."""
    require_agreement(decoder, run)
    require_thinkable(run.routing)
    n_true, context = run.thinking.n_true, run.model.context
    require(n_true < context, "thinking.n_true", n_true, f"must be below model.context = {context}")


def _require_same(group: str, decoders: Any, runs: Any) -> None:
    for field in dataclasses.fields(runs):
        of_decoder, of_run = getattr(decoders, field.name), getattr(runs, field.name)
        name = f"{group}.{field.name}"
        require(of_decoder == of_run, f"decoder's {name}", of_decoder, f"must be the run's, {of_run!r}")

"""What an objective is: what a run learns and how that is measured, as pure functions; and whom it may be made for.

The loop makes decoder and objective from one configuration. A library call gets decoder and configuration apart, and
would pass over what differs in silence: `require_agreement` does not.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from mod_star.config import RunConfig, require_thinkable
from mod_star.errors import InputError, require
from mod_star.model import Decoder
from mod_star.model.lora import with_adapters
from mod_star.model.parts import DEFAULT_PARTS, require_array

Batch = dict[str, jax.Array]
"""tokens, targets, positions, segment_ids int32 and weights float32, all [B, S]; segment id 0 is padding."""
Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class Objective:
    """What a run learns and how it is measured, as pure functions."""

    loss: Callable[..., tuple[jax.Array, Metrics]]
    """(params, batch, key, targets, valid) and each of `frozen` -> (float32 loss, sums): additive over portions of a
    batch, given the totals of the whole: float32 weighted targets and tokens without padding. See `takes_step`."""
    metrics: Callable[[Metrics, jax.Array, jax.Array], Metrics]
    """(sums, targets, valid) -> metrics of a training step."""
    eval_step: Callable[..., Metrics]
    """(params, batch, key) and each of `frozen` -> sums, to be added up over batches."""
    summarise: Callable[[dict[str, Any]], dict[str, Any]]
    """Added-up sums -> held-out metrics, plain floats and lists; `eval_loss` must be one."""
    examples: Callable[..., Any] | None = None
    """(params, batch, key) and each of `frozen` -> `quiet_star.Examples`, for RUN/thoughts.jsonl. None: there are no
    thoughts."""
    frozen: tuple[Any, ...] = ()
    """Pytrees of arrays that loss, evaluation and examples read besides and that nothing changes, such as a teacher's
    parameters. Training hands them to its compiled programs as arguments; an array that a function closes over instead
    would be written out in the program. Neither checkpoints nor the optimizer's state hold them."""
    takes_step: bool = False
    """Whether the loss depends on how far training has come: it gets the keyword `step`, int32, the steps done."""


def checked(objective: Objective) -> Objective:
    """A user's objective, whose results are checked while they are traced.

    Raises:
      InputError: it is no `Objective`; later, when it is traced: loss, sums or metrics are of another shape or type.
    """
    if not isinstance(objective, Objective):
        raise InputError(
            f"parts.objective = {type(objective).__name__}: must return a mod_star.training.objectives.Objective"
        )

    if objective.takes_step and not _takes_step(objective.loss):
        raise InputError(
            "parts.objective.loss: must take the keyword step where Objective.takes_step is True (as with "
            "routing.noise or routing.explore)"
        )

    def loss(*arguments: Any, **step: jax.Array) -> tuple[jax.Array, Metrics]:
        result = objective.loss(*arguments, **step)
        if not isinstance(result, tuple) or len(result) != 2:
            raise InputError(f"parts.objective.loss = {type(result).__name__}: must be a pair (loss, sums)")
        return require_array("objective.loss", result[0], ()), _arrays("loss's sums", result[1])

    def metrics(*arguments: Any) -> Metrics:
        return _arrays("metrics", objective.metrics(*arguments))

    def eval_step(*arguments: Any) -> Metrics:
        return _arrays("eval_step", objective.eval_step(*arguments))

    return replace(objective, loss=loss, metrics=metrics, eval_step=eval_step)


def _takes_step(loss: Callable[..., Any]) -> bool:
    parameters = inspect.signature(loss).parameters.values()
    return any(each.name == "step" or each.kind is each.VAR_KEYWORD for each in parameters)


def with_adapted_params(objective: Objective, run: RunConfig) -> Objective:
    """An objective whose functions may be given adapters (`mod_star.model.lora`): it gets `Adapted` weights instead."""
    if run.lora.rank == 0:
        return objective

    def adapted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *others, **step: function(with_adapters(params, run.lora), *others, **step)

    examples = None if objective.examples is None else adapted(objective.examples)
    return replace(objective, loss=adapted(objective.loss), eval_step=adapted(objective.eval_step), examples=examples)


def _arrays(name: str, values: Any) -> Metrics:
    if not isinstance(values, dict) or not all(isinstance(value, jax.Array) for value in values.values()):
        raise InputError(f"parts.objective.{name} = {type(values).__name__}: must be a dict of arrays")
    return values


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
    if run.thinks and run.thinking.stages:
        raise InputError(
            f"thinking.stages = {run.thinking.stages}: a step or a loss is of one length of thoughts; make one for "
            "each of mod_star.stages.plan_stages(run).stages, with stage.run"
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

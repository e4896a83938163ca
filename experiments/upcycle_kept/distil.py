"""Next-token prediction, and the Kullback-Leibler divergence from the dense model's prediction of each token.

The dense model lies beside the run that training starts from, in `imported`. The logits of one sequence exist at a
time; both losses are computed from the same ones.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import RunConfig
from mod_star.model import Decoder
from mod_star.model.transformer import logits_of
from mod_star.parts import Parts
from mod_star.runs.directory import LoadedRun, load_run
from mod_star.training.objectives import Batch, Metrics, Objective, forward, next_token
from mod_star.training.objectives.next_token import other_losses


@cache
def teacher_of(start: str) -> LoadedRun:
    """The dense model beside the run that training starts from."""
    return load_run(Path(start).parent / "imported")


def both_losses(
    params: Any, hidden: jax.Array, teacher: Any, expected: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the targets and KL(teacher || student), in nats, summed over the weighted positions.

    Args:
      params: the student's.
      hidden: its hidden states, [B, S, D].
      teacher: the teacher's parameters.
      expected: its hidden states.
      batch: with targets and weights.
    """

    def sequence(each: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        student_SxD, teacher_SxD, targets_S, weights_S = each
        log_q = jax.nn.log_softmax(logits_of(params, student_SxD))
        log_p = jax.nn.log_softmax(logits_of(teacher, teacher_SxD))
        nll_S = -jnp.take_along_axis(log_q, targets_S[:, None], -1)[:, 0]
        kl_S = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
        return jnp.sum(weights_S * nll_S), jnp.sum(weights_S * kl_S)

    nll, kl = jax.lax.map(sequence, (hidden, expected, batch["targets"], batch["weights"]))
    return jnp.sum(nll), jnp.sum(kl)


def distil(decoder: Decoder, run: RunConfig) -> Objective:
    """The objective of a run: the loss of the next token plus the divergence from the dense model."""
    plain = next_token(decoder, run)
    if run.init_from is None:  # a run that is used, not trained
        return plain
    teacher = teacher_of(run.init_from)
    dense = Decoder(replace(teacher.decoder.config, dtype=run.model.dtype), teacher.decoder.routing)

    def loss(params: Any, batch: Batch, key: jax.Array, targets: jax.Array, valid: jax.Array, frozen: Any) -> Any:
        output = forward(decoder, params, batch, key, "top_k")
        expected = jax.lax.stop_gradient(forward(dense, frozen, batch, None).hidden)
        nll, kl = both_losses(params, output.hidden, frozen, expected, batch)
        others, sums = other_losses(decoder, run, output, batch, valid)
        return (nll + kl) / targets + others, {"nll": nll, "kl": kl} | sums

    def metrics(sums: Metrics, targets: jax.Array, valid: jax.Array) -> Metrics:
        return plain.metrics(sums, targets, valid) | {"kl": sums["kl"] / targets}

    def evaluate(params: Any, batch: Batch, key: jax.Array, frozen: Any) -> Metrics:
        return plain.eval_step(params, batch, key)

    return replace(plain, loss=loss, metrics=metrics, eval_step=evaluate, frozen=(teacher.params,))


parts = Parts(objective=distil)

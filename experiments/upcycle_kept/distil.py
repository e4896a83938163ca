"""Next-token prediction, and the Kullback-Leibler divergence from the dense model's prediction of each token.

The dense model lies beside the run that training starts from, in `imported`. Its logits are computed for
`train.loss_chunk` positions of a sequence at a time.
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


@cache
def teacher_of(start: str) -> LoadedRun:
    """The dense model beside the run that training starts from."""
    return load_run(Path(start).parent / "imported")


def divergence(params: Any, hidden: jax.Array, teacher: Any, expected: jax.Array, weights: jax.Array) -> jax.Array:
    """KL(teacher || student) in nats, summed over the weighted positions of a batch; hidden states are [B, S, D]."""

    def one(student_D: jax.Array, teacher_D: jax.Array) -> jax.Array:
        log_q = jax.nn.log_softmax(logits_of(params, student_D[None])[0])
        log_p = jax.nn.log_softmax(logits_of(teacher, teacher_D[None])[0])
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    sequence = jax.checkpoint(lambda pair: jax.vmap(one)(*pair))
    return jnp.sum(weights * jax.lax.map(sequence, (hidden, expected)))


def distil(decoder: Decoder, run: RunConfig) -> Objective:
    """The objective of a run: the loss of the next token plus the divergence from the dense model."""
    plain = next_token(decoder, run)
    if run.init_from is None:  # a run that is used, not trained
        return plain
    teacher = teacher_of(run.init_from)

    def loss(params: Any, batch: Batch, key: jax.Array, targets: jax.Array, valid: jax.Array, frozen: Any) -> Any:
        total, sums = plain.loss(params, batch, key, targets, valid)
        hidden = forward(decoder, params, batch, key, "top_k").hidden
        expected = jax.lax.stop_gradient(forward(teacher.decoder, frozen, batch, None).hidden)
        kl = divergence(params, hidden, frozen, expected, batch["weights"])
        return total + kl / targets, sums | {"kl": kl}

    def metrics(sums: Metrics, targets: jax.Array, valid: jax.Array) -> Metrics:
        return plain.metrics(sums, targets, valid) | {"kl": sums["kl"] / targets}

    def evaluate(params: Any, batch: Batch, key: jax.Array, frozen: Any) -> Metrics:
        return plain.eval_step(params, batch, key)

    return replace(plain, loss=loss, metrics=metrics, eval_step=evaluate, frozen=(teacher.params,))


parts = Parts(objective=distil)

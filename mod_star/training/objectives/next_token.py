"""The next-token objective, dense or routed: its loss, its evaluation, and what is measured of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mod_star.config import RunConfig
from mod_star.distributed.sharding import batch_vmap
from mod_star.model import Decoder, Output, Trace
from mod_star.model.cross_entropy import cross_entropy
from mod_star.model.exploration import exploration_left, explores
from mod_star.model.routing import RoutingMode
from mod_star.model.transformer import head_matrix
from mod_star.training.objectives.expert_use import balance_term, expert_metrics, expert_sums
from mod_star.training.objectives.objective import Batch, Metrics, Objective, require_agreement


def forward(
    decoder: Decoder,
    params: dict[str, Any],
    batch: Batch,
    key: jax.Array | None,
    mode: RoutingMode = "causal",
    keep_keys_values: bool = False,
    exploration: jax.Array | None = None,
) -> Output:
    """Hidden states and routing of a batch; every leaf gets a leading batch axis. Arguments as for `Decoder`."""
    B = batch["tokens"].shape[0]
    draws = decoder.routing.selection == "stochastic" or exploration is not None
    keys = jax.random.split(key, B) if draws and key is not None else None

    def one(tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, key: jax.Array | None) -> Output:
        output: Any = decoder.apply(
            {"params": params}, tokens, positions, segment_ids,
            mode=mode, key=key, exploration=exploration, keep_keys_values=keep_keys_values,
        )  # fmt: skip
        return output

    return batch_vmap(one)(batch["tokens"], batch["positions"], batch["segment_ids"], keys)


def routing_sums(
    trace: Trace,
    valid_BxS: jax.Array,
    auxiliary_loss: Callable[..., jax.Array] | None,
    target: jax.Array | None = None,
) -> Metrics:
    """Sums over the batch's valid tokens that routing's losses and metrics are ratios of; all float32.

    trains_rule: `auxiliary_loss` (see `mod_star.Parts`; None: left out) against `target` (bool [B, groups, S]; what the
    scores selected if None), summed over layers too. Per layer [groups]: correct decisions,
    routed (selected) tokens, entropy of the rule's probability in nats, first and second moment of the gates.
    """
    valid = valid_BxS[:, None]  # trace arrays are [B, groups, S]
    selected = trace.selected.astype(jnp.float32)
    if target is None:
        target = trace.selected if trace.by_score is None else trace.by_score
    per_layer = lambda a: jnp.sum(jnp.where(valid, a, 0), (0, 2), dtype=jnp.float32)  # noqa: E731
    probability = jax.nn.sigmoid(trace.logits)
    entropy = probability * jax.nn.softplus(-trace.logits) + (1 - probability) * jax.nn.softplus(trace.logits)
    sums = {
        "correct": per_layer((trace.logits > 0) == target),
        "routed": per_layer(selected),
        "entropy": per_layer(entropy),
        "gates": per_layer(trace.gates * selected),
        "squared_gates": per_layer(trace.gates**2 * selected),
        "overflow": per_layer(trace.overflow),
    }
    if auxiliary_loss is not None:
        sums["trains_rule"] = jnp.sum(auxiliary_loss(trace, valid_BxS, target))
    return sums


def routing_metrics(sums: Metrics, tokens: jax.Array) -> Metrics:
    """The causal rule's accuracy (scalar); per routed layer: routed fraction, routing entropy, gate mean and std."""
    routed = jnp.maximum(sums["routed"], 1.0)
    mean = sums["gates"] / routed
    return {
        "predictor_accuracy": jnp.mean(sums["correct"]) / tokens,
        "routed_fraction": sums["routed"] / tokens,
        "routing_entropy": sums["entropy"] / tokens,
        "gate_mean": mean,
        "gate_std": jnp.sqrt(jnp.maximum(sums["squared_gates"] / routed - mean**2, 0.0)),
    }


def make_loss(decoder: Decoder, run: RunConfig) -> Callable[..., tuple[jax.Array, Metrics]]:
    """`loss(params, batch, key, targets, valid, step=0) -> (loss, sums)`, a sum over the batch over the given totals.

    The totals (weighted targets and non-pad tokens of the *whole* batch) make the losses of portions of a batch add
    up to the batch's. `loss` = LM loss + auxiliary_weight x mean over routed layers of the causal rule's loss
    + experts_weight x mean over layers of the experts' balance loss. `step`, the steps done, is what `routing.noise`
    and `routing.explore` fall by.
    """
    require_agreement(decoder, run)

    def loss(
        params: dict[str, Any],
        batch: Batch,
        key: jax.Array,
        targets: jax.Array,
        valid: jax.Array,
        step: jax.Array | int = 0,
    ) -> tuple[jax.Array, Metrics]:
        output = forward(decoder, params, batch, key, "top_k", exploration=exploration_left(run.routing, step))
        nll = cross_entropy(
            output.hidden, head_matrix(params), batch["targets"], batch["weights"], run.train.loss_chunk
        )
        others, sums = other_losses(decoder, run, output, batch, valid)
        return nll / targets + others, {"nll": nll} | sums

    return loss


def other_losses(
    decoder: Decoder, run: RunConfig, output: Output, batch: Batch, valid: jax.Array
) -> tuple[jax.Array | float, Metrics]:
    """What `make_loss` adds to the loss of the next token, for the causal rule and experts, and its sums.

    Args:
      decoder: what computed `output`.
      run: its configuration.
      output: of the batch or a portion of it, routed by top-k.
      batch: that batch or portion.
      valid: tokens of the whole batch without padding.
    """
    routing = run.routing
    sums = expert_sums(output.load, batch["segment_ids"] > 0, run.model)
    total = balance_term(sums, valid, run.model)
    if output.trace is not None:
        sums |= routing_sums(output.trace, batch["segment_ids"] > 0, decoder.parts.auxiliary_loss_of(routing))
        if "trains_rule" in sums:
            layers = output.trace.selected.shape[1]
            total += routing.auxiliary_weight * sums["trains_rule"] / (valid * layers)
    return total, sums


def next_token(decoder: Decoder, run: RunConfig) -> Objective:
    """The objective of next-token prediction.

    Raises:
      InputError: the decoder is not the run's, or the run has several capacities.
    """
    loss, eval_step = make_loss(decoder, run), make_eval_step(decoder, run)
    takes_step = explores(run.routing)
    return Objective(loss, next_token_metrics, eval_step, summarise_eval, takes_step=takes_step)


def next_token_metrics(sums: Metrics, targets: jax.Array, valid: jax.Array) -> Metrics:
    """Metrics of a training step from its sums: lm_loss (nats per token), `routing_metrics` and `expert_metrics`."""
    metrics = {"lm_loss": sums["nll"] / targets} | expert_metrics(sums)
    if "routed" in sums:
        metrics |= routing_metrics(sums, valid)
    if "trains_rule" in sums:
        metrics["auxiliary_loss"] = sums["trains_rule"] / (valid * sums["routed"].shape[0])
    return metrics


def make_eval_step(decoder: Decoder, run: RunConfig) -> Callable[[dict[str, Any], Batch, jax.Array], Metrics]:
    """The pure evaluation step `(params, batch, key) -> sums`, to be added up over batches for `summarise_eval`.

    A routed model is run twice: with the top-k routing that it was trained with, and with the causal rule.
    """
    require_agreement(decoder, run)

    def sums_of(params: dict[str, Any], batch: Batch, key: jax.Array, mode: RoutingMode) -> Metrics:
        output = forward(decoder, params, batch, key, mode)
        nll = cross_entropy(
            output.hidden, head_matrix(params), batch["targets"], batch["weights"], run.train.loss_chunk
        )
        sums = {"nll": nll} | expert_sums(output.load, batch["segment_ids"] > 0, run.model)
        if output.trace is not None:
            sums |= routing_sums(output.trace, batch["segment_ids"] > 0, decoder.parts.auxiliary_loss_of(run.routing))
        return sums

    def eval_step(params: dict[str, Any], batch: Batch, key: jax.Array) -> Metrics:
        sums = sums_of(params, batch, key, "top_k")
        if run.routing.every:
            sums |= {f"causal_{name}": a for name, a in sums_of(params, batch, key, "causal").items()}
        sums["targets"] = jnp.sum(batch["weights"])
        sums["valid"] = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
        return sums

    return eval_step


def summarise_eval(sums: dict[str, Any]) -> dict[str, Any]:
    """Held-out metrics from added-up sums, as plain floats and lists.

    eval_loss: nats per token, routed as trained. For a routed model also eval_loss_causal and causal_gap (their
    difference, what causal sampling costs), eval_predictor_accuracy (causal rule against top-k on the stream that
    top-k routing made), and per layer eval_routed_fraction and eval_overflow (share of tokens that the causal rule
    wanted but found no slot for) under the causal rule. With experts those of `expert_metrics`, routed as trained.
    """
    sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    record: dict[str, Any] = {"eval_loss": float(sums["nll"] / sums["targets"])}
    record |= {f"eval_{name}": value.tolist() for name, value in expert_metrics(sums).items()}
    if "causal_nll" in sums:
        record["eval_loss_causal"] = float(sums["causal_nll"] / sums["targets"])
        record["causal_gap"] = record["eval_loss_causal"] - record["eval_loss"]
        record["eval_predictor_accuracy"] = float(sums["correct"].mean() / sums["valid"])
        record["eval_routed_fraction"] = (sums["causal_routed"] / sums["valid"]).tolist()
        record["eval_overflow"] = (sums["causal_overflow"] / sums["valid"]).tolist()
    return record

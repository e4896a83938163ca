"""Quiet-STaR as a training objective: its loss, what is measured of it, and thoughts to look at.

Axes as in `mod_star.thinking.objective`. Statistics of thinking are taken over predictions right after <end> (the next
token) unless they say otherwise; `gain` is base NLL less talk NLL, positive where thoughts help.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import struct

from mod_star import random_streams
from mod_star.config import RunConfig, ThinkingConfig
from mod_star.model import Decoder, Output, Trace
from mod_star.model.cross_entropy import cross_entropy_by_token, token_entropy
from mod_star.model.routing import select_top
from mod_star.model.transformer import head_matrix
from mod_star.thinking.decider import decider_error, decider_of, expected_gain
from mod_star.thinking.objective import (
    Places,
    Talk,
    choose_places,
    most_places,
    place_count,
    predicted,
    sample_thoughts,
    talk_loss,
)
from mod_star.thinking.sample import ThinkingDecoder, thought_slots
from mod_star.thinking.thought import Thought
from mod_star.thinking.where import position_scores
from mod_star.training.objectives.expert_use import balance_term, expert_metrics, expert_sums
from mod_star.training.objectives.next_token import forward, next_token, next_token_metrics, routing_sums
from mod_star.training.objectives.objective import Batch, Metrics, Objective, require_thinker

if TYPE_CHECKING:
    from mod_star.tokenization import Tokenizer

DECILES = 10
EXAMPLES = 4
EXAMPLE_CONTEXT = 48


@struct.dataclass
class Examples:
    """Thoughts to look at: E places of one sequence, M thoughts at each."""

    indices_E: jax.Array
    """int32 index in the sequence; -1 where there is no place."""
    thoughts_ExMxT: jax.Array
    """int32 thought tokens; -1 for pauses."""
    advantages_ExM: jax.Array
    """float32 reward of each thought less its baseline."""
    gains_ExM: jax.Array
    """float32 base NLL less NLL after the thought, of the next token, in nats."""


def make_quiet_star_loss(decoder: Decoder, run: RunConfig) -> Callable[..., tuple[jax.Array, Metrics]]:
    """`loss(params, batch, key, targets, valid) -> (loss, sums)` with the signature of `next_token.make_loss`.

    The text is routed causally, for thoughts must not see what lies ahead, not even through the choice of tokens. The
    predictor goes on learning top-k routing: its targets are the tokens that top-k would have taken of the same stream.

    With gradient accumulation, NLL after thoughts and REINFORCE are means over a portion of the batch, and weighted by
    the portion's share of the batch's targets.
    """
    require_thinker(decoder, run)
    thinking, chunk = run.thinking, run.train.loss_chunk
    thinker = ThinkingDecoder(decoder, thinking)

    def loss(
        params: dict[str, Any], batch: Batch, key: jax.Array, targets: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        places_key, draws_key = jax.random.split(key)
        text_output = forward(decoder, params, batch, None, "causal", keep_keys_values=True)
        head = head_matrix(params)
        nll, base_nll_BxS = cross_entropy_by_token(text_output.hidden, head, batch["targets"], batch["weights"], chunk)
        places = choose_places(thinker, batch, text_output, jax.lax.stop_gradient(head), places_key, chunk)
        thoughts = sample_thoughts(thinker, params, text_output, batch, places, draws_key, thinking.temperature)
        talk_total, talk = talk_loss(thinker, params, text_output, batch, places, thoughts, chunk)
        share = jnp.sum(batch["weights"]) / targets
        total = thinking.base_weight * nll / targets + share * talk_total
        sums = {"nll": nll} | expert_sums(text_output.load, batch["segment_ids"] > 0, run.model)
        total += balance_term(sums, valid, run.model)
        if text_output.trace is not None:
            target = top_k_selection(decoder, text_output.trace, batch)
            auxiliary_loss = decoder.parts.auxiliary_loss_of(run.routing)
            sums |= routing_sums(text_output.trace, batch["segment_ids"] > 0, auxiliary_loss, target)
            layers = target.shape[1]
            total += run.routing.auxiliary_weight * sums["trains_rule"] / (valid * layers)
        sums |= thinking_sums(batch, places, thoughts, talk, base_nll_BxS, thinking)
        if thinking.decider_width:
            sums["decider_error"] = decider_sum(params, text_output, batch, places, talk, base_nll_BxS, thinking)
            total += share * sums["decider_error"] / jnp.maximum(sums["next_predictions"], 1.0)
        return total, sums

    return loss


def quiet_star(decoder: Decoder, run: RunConfig) -> Objective:
    """The objective of Quiet-STaR, with thoughts to look at; for thoughts of no tokens that of `next_token`.

    Raises:
      InputError: the decoder is not the run's, or cannot think; the run has several capacities or lengths of thoughts.
    """
    if run.thinking.thought_length == 0:
        return next_token(decoder, run)
    return Objective(
        make_quiet_star_loss(decoder, run),
        quiet_star_metrics,
        make_quiet_star_eval(decoder, run),
        summarise_thinking,
        make_examples(decoder, run),
    )


def top_k_selection(decoder: Decoder, trace: Trace, batch: Batch) -> jax.Array:
    """bool [B, groups, S]: the tokens that top-k routing would have selected of a stream that was routed causally."""
    select = lambda scores, valid: decoder.parts.select(scores, valid, decoder.routing).mask_S  # noqa: E731
    return jax.vmap(jax.vmap(select, (0, None)))(trace.scores, batch["segment_ids"] > 0)


def thinking_sums(
    batch: Batch, places: Places, thoughts: Thought, talk: Talk, base_nll_BxS: jax.Array, thinking: ThinkingConfig
) -> Metrics:
    """Float32 sums over thinking positions that the metrics are ratios of; those by decile are arrays of ten."""
    index, weights = predicted(batch, places, thinking)
    first = weights[..., 0] > 0
    thought = jnp.broadcast_to(places.filled_BxJ[..., None], talk.advantages_BxJxM.shape)
    base = jax.vmap(lambda row, at: row[at])(base_nll_BxS, index)
    talk_nll = jnp.mean(talk.nll_BxJxMxN, 2)
    total = lambda values, where: jnp.sum(jnp.where(where, jnp.asarray(values, jnp.float32), 0.0))  # noqa: E731
    used = jnp.maximum(talk.advantages_BxJxM, 0.0) if thinking.drop_negative else talk.advantages_BxJxM
    by_decile, in_decile = gain_by_decile(base[..., 0], (base - talk_nll)[..., 0], first)
    positions = total(1.0, places.filled_BxJ)
    sums = {
        "thinking_positions": positions,
        "thoughts": positions * thinking.n_thoughts,
        "thought_tokens": positions * thinking.n_thoughts * thinking.thought_length,
        "talk_predictions": jnp.sum(weights),
        "talk_nll": jnp.sum(weights * talk_nll),
        "next_predictions": total(1.0, first),
        "next_base_nll": total(base[..., 0], first),
        "next_talk_nll": total(talk_nll[..., 0], first),
        "mixing_weight": total(jnp.mean(talk.weights_BxJxMxN[..., 0], -1), first),
        "reward": total(used, thought),
        "squared_advantage": total(talk.advantages_BxJxM**2, thought),
        "positive": total(talk.advantages_BxJxM > 0, thought),
        "thought_entropy": total(thoughts.entropies_T, places.filled_BxJ[..., None, None]),
        "gain_by_decile": by_decile,
        "in_decile": in_decile,
    }
    if talk.computed_BxJxMxG.shape[-1]:
        filled = places.filled_BxJ[..., None, None]
        sums["thought_routed"] = jnp.sum(jnp.where(filled, talk.computed_BxJxMxG, 0.0), (0, 1, 2))
        sums["thought_overflow"] = jnp.sum(jnp.where(filled, talk.overflow_BxJxMxG, 0.0), (0, 1, 2))
    return sums


def decider_sum(
    params: dict[str, Any], text_output: Output, batch: Batch, places: Places, talk: Talk, base_nll_BxS: jax.Array,
    thinking: ThinkingConfig,
) -> jax.Array:  # fmt: skip
    """Sum over thinking positions of the decider's squared error; differentiable in the decider's parameters alone."""
    index, weights = predicted(batch, places, thinking)
    at_places = jax.vmap(lambda row, at: row[at])
    gain_BxJ = at_places(base_nll_BxS, index[..., 0]) - jnp.mean(talk.nll_BxJxMxN[..., 0], 2)
    hidden_BxJxD = at_places(text_output.hidden, index[..., 0])
    rows = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
    return decider_error(decider_of(params), *map(rows, (hidden_BxJxD, gain_BxJ, weights[..., 0] > 0)))


def gain_by_decile(base_nll: jax.Array, gain: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of gain over tenths of the predictions, the surest (lowest base NLL) first, and the counts; [10] each."""
    ranks = jnp.argsort(jnp.argsort(jnp.where(where, base_nll, jnp.inf).ravel())).astype(jnp.int32)
    decile = ranks * DECILES // jnp.maximum(jnp.sum(where, dtype=jnp.int32), 1)
    member = (decile == jnp.arange(DECILES, dtype=jnp.int32)[:, None]) & where.ravel()
    return jnp.sum(jnp.where(member, gain.ravel(), 0.0), 1), jnp.sum(member, 1, dtype=jnp.float32)


def quiet_star_metrics(sums: Metrics, targets: jax.Array, valid: jax.Array) -> Metrics:
    """Metrics of a training step from its sums: those of `next_token_metrics`, of the text without thoughts, and of it.

    base_nll, talk_nll (nats per next token at the thinking positions), gain, gain_by_decile, talk_nll_ahead (mean over
    all n_true tokens), mixing_weight (w), reward_mean (as REINFORCE uses it: less the baseline, negative ones dropped
    if so configured), reward_std (before dropping), reward_positive (share), thought_entropy (nats per thought token),
    thinking_positions, decider_error (of a model with a decider: mean squared error of the expected gain, in nats
    squared), and per routed layer thought_routed_fraction and thought_overflow.
    """
    at_least_one = lambda name: jnp.maximum(sums[name], 1.0)  # noqa: E731
    following, thoughts = at_least_one("next_predictions"), at_least_one("thoughts")
    base, talk = sums["next_base_nll"] / following, sums["next_talk_nll"] / following
    metrics = next_token_metrics(sums, targets, valid) | {
        "base_nll": base,
        "talk_nll": talk,
        "gain": base - talk,
        "gain_by_decile": sums["gain_by_decile"] / at_least_one("in_decile"),
        "talk_nll_ahead": sums["talk_nll"] / at_least_one("talk_predictions"),
        "mixing_weight": sums["mixing_weight"] / following,
        "reward_mean": sums["reward"] / thoughts,
        "reward_std": jnp.sqrt(sums["squared_advantage"] / thoughts),
        "reward_positive": sums["positive"] / thoughts,
        "thought_entropy": sums["thought_entropy"] / at_least_one("thought_tokens"),
        "thinking_positions": sums["thinking_positions"],
    }
    if "decider_error" in sums:
        metrics["decider_error"] = sums["decider_error"] / following
    if "thought_routed" in sums:
        metrics["thought_routed_fraction"] = sums["thought_routed"] / thoughts
        metrics["thought_overflow"] = sums["thought_overflow"] / thoughts
    return metrics


def make_quiet_star_eval(decoder: Decoder, run: RunConfig) -> Callable[..., Metrics]:
    """`(params, batch, key) -> sums` for `summarise_thinking`: a greedy thought before every token of held-out text.

    Only the token right after a thought is predicted; the thought's routed blocks have as many slots as in training.
    """
    require_thinker(decoder, run)
    thinking = replace(
        run.thinking, n_true=1, n_thoughts=1, think_fraction=1.0, policy_weight=0.0, talk_weight=1.0
    )  # fmt: skip
    chunk, slots = run.train.loss_chunk, thought_slots(run.routing, run.thinking)
    thinker = ThinkingDecoder(decoder, thinking, slots)

    def eval_step(params: dict[str, Any], batch: Batch, key: jax.Array) -> Metrics:
        text_output = forward(decoder, params, batch, None, "causal", keep_keys_values=True)
        head = head_matrix(params)
        nll, base_BxS = cross_entropy_by_token(text_output.hidden, head, batch["targets"], batch["weights"], chunk)
        # All positions think, and greedily: what is drawn here decides nothing but their order of choice.
        places = choose_places(thinker, batch, text_output, head, jax.random.fold_in(key, random_streams.PLACES), chunk)
        draws_key = jax.random.fold_in(key, random_streams.THOUGHTS)
        thoughts = sample_thoughts(thinker, params, text_output, batch, places, draws_key, temperature=0.0)
        _, talk = talk_loss(thinker, params, text_output, batch, places, thoughts, chunk)
        sums = {"nll": nll, "targets": jnp.sum(batch["weights"])}
        sums |= expert_sums(text_output.load, batch["segment_ids"] > 0, run.model)
        sums |= thinking_sums(batch, places, thoughts, talk, base_BxS, thinking)
        talk_BxS = jnp.where(places.filled_BxJ, talk.nll_BxJxMxN[:, :, 0, 0], base_BxS)
        # What the model predicts when only as many positions think as in training, and those that would there.
        J, most_B = place_count(run.thinking, batch["tokens"].shape[1]), most_places(batch, run.thinking)
        rank_by = position_scores(decoder.parts, run.thinking, batch, text_output.hidden, head, key, chunk)
        top = jax.vmap(lambda scores, eligible, most: select_top(scores, eligible, J, most).mask_S)
        chosen = top(rank_by, batch["weights"] > 0, most_B)
        if run.thinking.decider_width:
            expected = jax.vmap(lambda h: expected_gain(decider_of(params), h))(text_output.hidden)
            decided = top(expected, batch["weights"] > 0, most_B)
            sums["decided_nll"] = jnp.sum(jnp.where(decided, talk_BxS, base_BxS) * batch["weights"])
        sums["budgeted_nll"] = jnp.sum(jnp.where(chosen, talk_BxS, base_BxS) * batch["weights"])
        if text_output.trace is not None:
            auxiliary_loss = decoder.parts.auxiliary_loss_of(run.routing)
            selected = top_k_selection(decoder, text_output.trace, batch)
            sums |= routing_sums(text_output.trace, batch["segment_ids"] > 0, auxiliary_loss, selected)
            sums["valid"] = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
        return sums

    return eval_step


def summarise_thinking(sums: dict[str, Any]) -> dict[str, Any]:
    """Held-out metrics of a thinking model from added-up sums, as plain floats and lists.

    eval_loss: nats per token with thoughts at the share of positions that think in training. eval_base_loss: without
    thoughts. eval_talk_loss: with a greedy thought before every token. eval_gain: base less talk, also by decile of the
    base NLL, surest tenth first; eval_decided_loss, of a model with a decider: with thoughts at as many positions as
    for eval_loss, those where the decider expects most of them; eval_mixing_weight, eval_thought_entropy; for a routed
    model eval_predictor_accuracy, and per layer eval_routed_fraction, eval_overflow and eval_thought_routed_fraction.
    """
    sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    following = sums["next_predictions"]
    record: dict[str, Any] = {
        "eval_loss": sums["budgeted_nll"] / sums["targets"],
        "eval_base_loss": sums["nll"] / sums["targets"],
        "eval_talk_loss": sums["next_talk_nll"] / following,
        "eval_gain": (sums["next_base_nll"] - sums["next_talk_nll"]) / following,
        "eval_gain_by_decile": sums["gain_by_decile"] / np.maximum(sums["in_decile"], 1),
        "eval_mixing_weight": sums["mixing_weight"] / following,
        "eval_thought_entropy": sums["thought_entropy"] / sums["thought_tokens"],
    }
    if "decided_nll" in sums:
        record["eval_decided_loss"] = sums["decided_nll"] / sums["targets"]
    record |= {f"eval_{name}": value for name, value in expert_metrics(sums).items()}
    if "routed" in sums:
        record["eval_predictor_accuracy"] = sums["correct"].mean() / sums["valid"]
        record["eval_routed_fraction"] = sums["routed"] / sums["valid"]
        record["eval_overflow"] = sums["overflow"] / sums["valid"]
        record["eval_thought_routed_fraction"] = sums["thought_routed"] / sums["thoughts"]
    return {name: value.tolist() for name, value in record.items()}


def make_examples(decoder: Decoder, run: RunConfig) -> Callable[..., Examples]:
    """`(params, batch, key) -> Examples`: thoughts as in training at the least certain places of the first sequence."""
    require_thinker(decoder, run)
    thinking = run.thinking
    thinker = ThinkingDecoder(decoder, thinking)

    def examples(params: dict[str, Any], batch: Batch, key: jax.Array) -> Examples:
        batch = jax.tree.map(lambda leaf: leaf[:1], batch)
        text_output = forward(decoder, params, batch, None, "causal", keep_keys_values=True)
        head, chunk = head_matrix(params), run.train.loss_chunk
        _, base_1xS = cross_entropy_by_token(text_output.hidden, head, batch["targets"], batch["weights"], chunk)
        count = batch["tokens"].shape[1] - thinking.n_true + 1
        select = jax.vmap(lambda score, valid: select_top(score, valid, min(EXAMPLES, count)))
        selection = select(token_entropy(text_output.hidden, head, chunk)[:, :count], batch["weights"][:, :count] > 0)
        places = Places(selection.indices_C, selection.filled_C)
        thoughts = sample_thoughts(thinker, params, text_output, batch, places, key, thinking.temperature)
        _, talk = talk_loss(thinker, params, text_output, batch, places, thoughts, chunk)
        base_E = base_1xS[0, places.indices_BxJ[0]]
        return Examples(
            jnp.where(places.filled_BxJ[0], places.indices_BxJ[0], -1),
            thoughts.tokens_T[0],
            talk.advantages_BxJxM[0],
            base_E[:, None] - talk.nll_BxJxMxN[0, :, :, 0],
        )

    return examples


def describe_examples(
    examples: Examples, tokens_S: npt.NDArray[np.int32], tokenizer: Tokenizer, n_true: int
) -> list[dict[str, Any]]:
    """Examples as JSON-able records: before and after (text around the place), thoughts, rewards, gains."""
    records = []
    for number, index in enumerate(examples.indices_E.tolist()):
        if index >= 0:
            decode = lambda ids: tokenizer.decode([i for i in ids.tolist() if i >= 0])  # noqa: E731
            records.append(
                {
                    "before": decode(tokens_S[max(0, index + 1 - EXAMPLE_CONTEXT) : index + 1]),
                    "after": decode(tokens_S[index + 1 : index + 1 + n_true]),
                    "thoughts": [decode(thought) for thought in examples.thoughts_ExMxT[number]],
                    "rewards": [round(float(r), 4) for r in examples.advantages_ExM[number]],
                    "gains": [round(float(g), 4) for g in examples.gains_ExM[number]],
                }
            )
    return records

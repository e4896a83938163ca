"""Quiet-STaR as a training objective: its loss and metrics, and a run that is interrupted."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from thinking_models import thinking_params

from mod_star import presets
from mod_star.config import RunConfig, ThinkingConfig
from mod_star.model import Decoder
from mod_star.model.cross_entropy import cross_entropy_by_token, token_entropy
from mod_star.model.transformer import head_matrix
from mod_star.runs.checkpoints import saved_steps
from mod_star.runs.metrics import MetricsWriter, read_metrics
from mod_star.thinking.objective import Places, sample_thoughts, talk_loss
from mod_star.thinking.sample import ThinkingDecoder
from mod_star.tokenization import load_tokenizer
from mod_star.training.interrupt import Interrupted
from mod_star.training.objectives.next_token import forward
from mod_star.training.objectives.quiet_star import (
    Examples,
    describe_examples,
    gain_by_decile,
    make_quiet_star_eval,
    make_quiet_star_loss,
    quiet_star_metrics,
    summarise_thinking,
)
from mod_star.training.optimizer import make_optimizer
from mod_star.training.train import train

STEPS = 4


def make_run() -> RunConfig:
    """One routed block; half of the positions think."""
    run = presets.tiny()
    return replace(
        run,
        model=replace(run.model, width=8, heads=1, layers=1, context=16, mlp_width=8),
        routing=replace(run.routing, every=1, capacity=0.5, predictor_width=4),
        train=replace(
            run.train, objective="quiet_star", steps=STEPS, batch_size=2, log_every=1, eval_every=2, checkpoint_every=2
        ),
        thinking=ThinkingConfig(
            thought_length=2, n_true=2, n_thoughts=2, chunk=8, think_fraction=0.5, think_where="entropy"
        ),
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "straight"
    train(make_run(), path, quiet=True)
    return path


def left_behind(path: Path) -> tuple[list[dict[str, Any]], str]:
    metrics = [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in read_metrics(path)]
    return metrics, (path / "thoughts.jsonl").read_text(encoding="utf-8")


@pytest.mark.nightly
def test_interrupted_and_resumed_equals_uninterrupted(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "stops", MetricsWriter.write

    def writing(self: MetricsWriter, step: int, values: Any) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, step, values)

    # The record of step 1 is written during step 2, whose evaluation is left to the next session.
    with monkeypatch.context() as patched:
        patched.setattr(MetricsWriter, "write", writing)
        with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
            train(make_run(), path, quiet=True)
    assert saved_steps(path / "checkpoints") == [2] and not (path / "thoughts.jsonl").read_text()
    train(make_run(), path, quiet=True)
    assert left_behind(path) == left_behind(uninterrupted)


@pytest.mark.slow
def test_what_a_run_leaves_behind(uninterrupted: Path) -> None:
    metrics, thoughts = left_behind(uninterrupted)
    steps = [record for record in metrics if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for record in steps:
        assert record["gain"] == pytest.approx(record["base_nll"] - record["talk_nll"], abs=1e-5)
        assert len(record["gain_by_decile"]) == 10 and record["thinking_positions"] <= 2 * 8
        assert record["talk_nll_ahead"] > 0 and 0 < record["thought_entropy"] < np.log(320)
        # Of two equal thoughts both may be the better one, by the last bit: not at most a half.
        assert 0 <= record["reward_positive"] <= 1 and 0 <= record["reward_mean"] <= record["reward_std"]
        for name in ("thought_routed_fraction", "thought_overflow", "routed_fraction"):
            assert len(record[name]) == 1 and 0 <= record[name][0] <= 1
    assert abs(steps[0]["gain"]) < 1e-5 and steps[0]["mixing_weight"] == 0, "it begins at the base prediction"
    assert steps[-1]["mixing_weight"] != 0
    evaluations = [record for record in metrics if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [2, 4]
    for record in evaluations:
        gain = record["eval_base_loss"] - record["eval_talk_loss"]
        assert record["eval_gain"] == pytest.approx(gain, abs=1e-5), "every token that is predicted has a thought"
        assert np.mean(record["eval_gain_by_decile"]) == pytest.approx(gain, abs=0.1)
        assert len(record["eval_thought_routed_fraction"]) == 1
    records = [json.loads(line) for line in thoughts.splitlines()]
    assert [record["step"] for record in records] == [2] * 4 + [4] * 4
    for record in records:
        assert len(record["thoughts"]) == len(record["rewards"]) == len(record["gains"]) == 2
        assert sum(record["rewards"]) == pytest.approx(0, abs=1e-3)
    assert all(any(record[name] for record in records) for name in ("before", "after"))


def with_fields(run: RunConfig, **fields: Any) -> RunConfig:
    return replace(run, thinking=replace(run.thinking, **fields))


@pytest.fixture(scope="module")
def greedy(routed_run: RunConfig, random_params: Any) -> tuple[RunConfig, Any]:
    """Thoughts are greedy, so that they don't depend on the key, and places are chosen by entropy."""
    run = replace(routed_run, thinking=ThinkingConfig(thought_length=2, n_true=2, chunk=8, temperature=0.0))
    run = with_fields(run, think_fraction=0.5, think_where="entropy", talk_weight=0.7, base_weight=0.9)
    return run, thinking_params(run, random_params(run.model, run.routing))


@pytest.mark.slow
def test_portions_of_a_batch_add_up_to_it_and_the_loss_is_made_of_the_metrics(
    greedy: tuple[RunConfig, Any], make_batch: Any
) -> None:
    run, params = greedy
    loss = make_quiet_star_loss(Decoder(run.model, run.routing), run)
    # The same number of targets and of thinking positions in both halves. A half is the batch with the rest as padding.
    batch = make_batch([[24], [13, 11], [24], [12, 12]], 24, 29)
    halves = [make_batch([[24], [13, 11], [], []], 24, 29), make_batch([[], [], [24], [12, 12]], 24, 29)]
    halves = [half | {name: batch[name] for name in ("tokens", "targets")} for half in halves]
    targets, valid = jnp.sum(batch["weights"]), jnp.float32(96)
    program = jax.jit(lambda batch: loss(params, batch, jax.random.key(0), targets, valid))
    (total, sums), *parts = (program(b) for b in (batch, *halves))
    summed, other_sums = jax.tree.map(jnp.add, *parts)
    np.testing.assert_allclose(total, summed, rtol=1e-5)
    for name, value in sums.items():
        # Deciles are those of a portion; the greedy thoughts of a place are equal but for rounding.
        if name not in ("gain_by_decile", "in_decile", "positive"):
            np.testing.assert_allclose(value, other_sums[name], rtol=1e-4, atol=1e-5, err_msg=name)
    metrics = quiet_star_metrics(sums, targets, valid)
    # Greedy thoughts of a place are the same, and so are their rewards: no REINFORCE.
    expected = 0.9 * metrics["lm_loss"] + 0.7 * metrics["talk_nll_ahead"] + 0.01 * metrics["auxiliary_loss"]
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert metrics["reward_std"] < 1e-4 and metrics["thinking_positions"] == 4 * 12
    np.testing.assert_allclose(metrics["gain"], metrics["base_nll"] - metrics["talk_nll"], rtol=1e-5)
    in_decile = np.asarray(sums["in_decile"])
    assert in_decile.sum() == sums["next_predictions"] == 48 and set(in_decile) == {4, 5}
    np.testing.assert_allclose(np.sum(metrics["gain_by_decile"] * in_decile) / 48, metrics["gain"], rtol=1e-4)


@pytest.mark.nightly
def test_held_out_loss_thinks_where_training_would(greedy: tuple[RunConfig, Any], make_batch: Any) -> None:
    run, params = greedy
    decoder, batch = Decoder(run.model, run.routing), make_batch([[24], [10, 9]], 24, 29)
    thinking = replace(run.thinking, n_true=1, n_thoughts=1, policy_weight=0.0)
    places = Places(jnp.tile(jnp.arange(24), (2, 1)), batch["weights"] > 0)

    @jax.jit
    def everything(params: Any, batch: Any) -> Any:
        sums = make_quiet_star_eval(decoder, run)(params, batch, jax.random.key(0))
        text, head = forward(decoder, params, batch, None, "causal", keep_keys_values=True), head_matrix(params)
        _, base = cross_entropy_by_token(text.hidden, head, batch["targets"], batch["weights"], 24)
        thoughts = sample_thoughts(
            ThinkingDecoder(decoder, thinking), params, text, batch, places, jax.random.key(1), 0.0
        )
        _, talk = talk_loss(ThinkingDecoder(decoder, thinking), params, text, batch, places, thoughts, 24)
        return sums, base, token_entropy(text.hidden, head, 24), talk.nll_BxJxMxN[:, :, 0, 0]

    sums, base, entropy, talk = everything(params, batch)
    record, counts = summarise_thinking(jax.device_get(sums)), np.asarray(batch["weights"]) > 0
    np.testing.assert_allclose(record["eval_base_loss"], base[counts].mean(), rtol=1e-5)
    np.testing.assert_allclose(record["eval_talk_loss"], talk[counts].mean(), rtol=1e-5)
    mixed = np.array(base)
    for row in range(2):
        # Half of the positions that two tokens can follow, be they padding: of 23, and of 19 tokens.
        candidates = sorted(np.flatnonzero(counts[row]), key=lambda i: -entropy[row, i])[: (12, 10)[row]]
        mixed[row, candidates] = talk[row, np.asarray(candidates)]
    np.testing.assert_allclose(record["eval_loss"], mixed[counts].mean(), rtol=1e-5)
    assert record["eval_loss"] not in (record["eval_base_loss"], record["eval_talk_loss"])


@pytest.mark.slow
def test_the_predictor_goes_on_learning_what_top_k_would_take_and_costs_the_language_model_nothing(
    greedy: tuple[RunConfig, Any], tiny_batch: dict[str, jax.Array]
) -> None:
    run, params = greedy
    decoder = Decoder(run.model, run.routing)
    loss = make_quiet_star_loss(decoder, run)

    @jax.jit
    def auxiliary(params: Any, batch: Any) -> Any:
        function = lambda p: loss(p, batch, jax.random.key(0), 50.0, 71.0)[1]["trains_rule"]  # noqa: E731
        return jax.value_and_grad(function)(params), forward(decoder, params, batch, None, "causal").trace

    (value, grads), trace = auxiliary(params, tiny_batch)
    expected = 0.0
    for row, valid in enumerate(np.asarray(tiny_batch["segment_ids"]) > 0):
        logits, scores = (np.asarray(a[row, 0], np.float64) for a in (trace.logits, trace.scores))
        top = sorted(np.flatnonzero(valid), key=lambda i: -scores[i])[: (6, 6, 5, 1)[row]]
        expected += sum(np.logaddexp(0, -logits[i] if i in top else logits[i]) for i in np.flatnonzero(valid))
        assert set(top) != set(np.flatnonzero(trace.selected[row, 0]))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.any(grad) == ("predictor" in name), name


def test_start_and_end_move_at_a_rate_of_their_own() -> None:
    run = make_run()
    params: Any = {"embedding": jnp.ones((4, 3)), "thinking": {"start": jnp.ones(3), "end": 2 * jnp.ones(3)}}
    params["thinking"]["mixing"] = {"first": jnp.ones((6, 3)), "start": jnp.ones(3)}
    grads = jax.tree.map(jnp.sin, params)

    def moved(rate: float) -> Any:
        optimizer = make_optimizer(with_fields(run, embedding_rate=rate), 10)
        return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(grads, params)

    fast, slow = moved(50.0), moved(1.0)
    for name in ("start", "end"):
        np.testing.assert_allclose(fast["thinking"].pop(name), 50 * slow["thinking"].pop(name), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, fast, slow)
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(slow))


@pytest.mark.parametrize("count", [0, 3, 37])
def test_gain_by_decile_equals_numpy(count: int) -> None:
    rng = np.random.default_rng(count)
    nll, gain = rng.random((2, 30)).astype(np.float32), rng.normal(size=(2, 30)).astype(np.float32)
    where = np.zeros(60, bool)
    where[rng.permutation(60)[:count]] = True
    sums, counts = gain_by_decile(jnp.asarray(nll), jnp.asarray(gain), jnp.asarray(where.reshape(2, 30)))
    expected, expected_counts = np.zeros(10), np.zeros(10)
    for rank, index in enumerate(sorted(np.flatnonzero(where), key=lambda i: nll.ravel()[i])):
        expected[rank * 10 // count] += gain.ravel()[index]
        expected_counts[rank * 10 // count] += 1
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(counts, expected_counts)


def test_examples_are_decoded() -> None:
    tokenizer = load_tokenizer("bytes")
    tokens = np.asarray(tokenizer.encode("x" * 30 + "The quick brown fox jumps over the lazy dog."), np.int32)
    spell = lambda text: [*tokenizer.encode(text)]  # noqa: E731
    examples = Examples(
        jnp.asarray([38, -1, 2]),
        jnp.asarray([[spell("ab"), [-1, -1]], [[0, 0], [0, 0]], [spell("cd"), spell("ef")]]),
        jnp.asarray([[0.123456, -0.123456], [9.0, 9.0], [0.0, 0.0]]),
        jnp.asarray([[1.0, -2.0], [9.0, 9.0], [0.5, 0.25]]),
    )
    first, second = describe_examples(examples, tokens, tokenizer, 3)
    assert first == {
        "before": "x" * 30 + "The quick", "after": " br", "thoughts": ["ab", ""],
        "rewards": [0.1235, -0.1235], "gains": [1.0, -2.0],
    }  # fmt: skip
    assert (second["before"], second["after"], second["thoughts"]) == ("xxx", "xxx", ["cd", "ef"])
    long = np.asarray(tokenizer.encode("a" * 100 + "b"), np.int32)
    assert describe_examples(replace(examples, indices_E=jnp.asarray([99])), long, tokenizer, 4)[0] == first | {
        "before": "a" * 48, "after": "b",
    }  # fmt: skip

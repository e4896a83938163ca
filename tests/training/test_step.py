"""The training and evaluation steps: what they compute, against NumPy, and what they must not compute."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_SHIPPED

from mod_star.config import ModelConfig, RoutingConfig, RunConfig
from mod_star.model import Decoder, Output
from mod_star.model.routing import RoutingMode
from mod_star.model.transformer import head_matrix
from mod_star.training.objectives.next_token import forward, make_eval_step, summarise_eval
from mod_star.training.state import TrainState, init_state
from mod_star.training.step import make_train_step

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def jitted(run: RunConfig, options: Any = None) -> Any:
    return jax.jit(make_train_step(Decoder(run.model, run.routing), run, 100), compiler_options=options)


def changed(run: RunConfig, **groups: dict[str, Any]) -> RunConfig:
    return replace(run, **{name: replace(getattr(run, name), **fields) for name, fields in groups.items()})


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def counts(state: TrainState) -> tuple[int, int, int]:
    """step, skipped, streak"""
    return int(state.step), int(state.skipped), int(state.streak)


def assert_same_bits(a: Any, b: Any) -> None:
    for (name, x), y in zip(flat(a).items(), flat(b).values(), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.fixture(scope="module")
def tiny_state(tiny_run: RunConfig, random_state: Callable[..., TrainState]) -> TrainState:
    return random_state(tiny_run)


@pytest.fixture(scope="module")
def tiny_program(tiny_run: RunConfig, tiny_state: TrainState, tiny_batch: Batch) -> Any:
    """Lowered and compiled: what is read as text and run."""
    lowered = jitted(tiny_run).lower(tiny_state, tiny_batch)
    return lowered, lowered.compile(AS_SHIPPED)


@pytest.fixture(scope="module")
def tiny_step(tiny_program: Any) -> Step:
    step: Step = tiny_program[1]
    return step


@pytest.fixture(scope="module")
def tiny_outputs(tiny_run: RunConfig, tiny_state: TrainState, tiny_batch: Batch) -> dict[str, Output]:
    """By routing mode, what the decoder (which test_decoder.py checks) gives for the batch."""
    decoder = Decoder(tiny_run.model, tiny_run.routing)
    modes: tuple[RoutingMode, ...] = ("top_k", "causal")
    run = jax.jit(lambda p, b: {mode: forward(decoder, p, b, None, mode) for mode in modes})
    outputs: dict[str, Output] = run(tiny_state.params, tiny_batch)
    return outputs


def mean_nll(hidden: jax.Array, params: Any, batch: Batch) -> float:
    """In float64, token by token, from all logits."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head_matrix(params), np.float64).T
    total, weights = 0.0, np.asarray(batch["weights"], np.float64)
    for b, s in np.argwhere(weights):
        row = logits[b, s]
        total += weights[b, s] * (np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[batch["targets"][b, s]])
    return total / weights.sum()


@pytest.mark.slow
def test_loss_and_metrics_equal_naive_sums_over_tokens(
    tiny_state: TrainState, tiny_batch: Batch, tiny_step: Step, tiny_outputs: dict[str, Output]
) -> None:
    """Also that the auxiliary targets are each row's own: a mistake in the batch offset changes every number here."""
    _, metrics = tiny_step(tiny_state, tiny_batch)
    nll = mean_nll(tiny_outputs["top_k"].hidden, tiny_state.params, tiny_batch)
    np.testing.assert_allclose(metrics["lm_loss"], nll, rtol=1e-5)

    trace = tiny_outputs["top_k"].trace
    scores, logits, gates = (np.asarray(getattr(trace, n), np.float64) for n in ("scores", "logits", "gates"))
    selected, valid = np.asarray(getattr(trace, "selected", None)), np.asarray(tiny_batch["segment_ids"]) > 0
    B, G, _ = scores.shape
    correct, entropy, bce = np.zeros(G), np.zeros(G), 0.0
    routed_gates: list[list[float]] = [[] for _ in range(G)]
    for b in range(B):
        for s in np.flatnonzero(valid[b]):
            for g in range(G):
                p = 1 / (1 + np.exp(-logits[b, g, s]))
                bce -= np.log(p if selected[b, g, s] else 1 - p)
                entropy[g] -= p * np.log(p) + (1 - p) * np.log(1 - p)
                correct[g] += (logits[b, g, s] > 0) == selected[b, g, s]
                if selected[b, g, s]:
                    np.testing.assert_allclose(gates[b, g, s], 1 / (1 + np.exp(-scores[b, g, s])), rtol=1e-5)
                    routed_gates[g].append(gates[b, g, s])
    tokens = valid.sum()
    np.testing.assert_allclose(metrics["auxiliary_loss"], bce / (tokens * G), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], nll + 0.01 * bce / (tokens * G), rtol=1e-5)
    np.testing.assert_allclose(metrics["predictor_accuracy"], correct.mean() / tokens, rtol=1e-6)
    np.testing.assert_allclose(metrics["routed_fraction"], [len(r) / tokens for r in routed_gates], rtol=1e-6)
    np.testing.assert_allclose(metrics["routing_entropy"], entropy / tokens, rtol=1e-5)
    np.testing.assert_allclose(metrics["gate_mean"], [np.mean(r) for r in routed_gates], rtol=1e-5)
    np.testing.assert_allclose(metrics["gate_std"], [np.std(r) for r in routed_gates], rtol=1e-3)
    # Of 24, 24, 19 and 4 tokens a quarter.
    assert [len(r) for r in routed_gates] == [6 + 6 + 5 + 1] * 2 and tokens == 71
    np.testing.assert_allclose(metrics["learning_rate"], 0.01)
    assert [metrics[name] for name in ("finite", "skipped", "streak")] == [1, 0, 0]


@pytest.mark.slow
def test_the_only_scatter_of_the_training_step_is_the_embedding_gradient(
    tiny_program: Any, scatters: Callable[[str], list[str]]
) -> None:
    lowered, program = tiny_program
    assert len(scatters(lowered.as_text())) == 1
    scattered = re.findall(r"= (\S+) scatter\(", program.as_text())
    assert [re.sub(r"\{.*", "", shape) for shape in scattered] == ["f32[29,16]"]


@pytest.mark.slow
def test_the_loss_falls_on_a_batch_that_is_seen_again_and_again(
    tiny_state: TrainState, tiny_batch: Batch, tiny_step: Step
) -> None:
    state, losses = tiny_state, []
    for _ in range(150):
        state, metrics = tiny_step(state, tiny_batch)
        losses.append(float(metrics["lm_loss"]))
    assert losses[-1] < 0.2 * losses[0]
    assert counts(state) == (150, 0, 0)
    assert metrics["predictor_accuracy"] > 0.05 + 53 / 71, "53 of 71 would be right by never routing"


def poisons(state: TrainState, batch: Batch) -> dict[str, tuple[TrainState, Batch]]:
    """Four ways to a step that is not finite."""
    nan_embedding = state.params["embedding"].at[batch["tokens"][0, 0]].set(jnp.nan)
    predictor = state.params["groups"]["routed"]["predictor"]
    routed = {**state.params["groups"]["routed"], "predictor": {**predictor, "shift": predictor["shift"] * jnp.inf}}
    groups = {**state.params["groups"], "routed": routed}
    return {
        "infinite weight": (state, {**batch, "weights": batch["weights"].at[0, 0].set(jnp.inf)}),
        "NaN weight": (state, {**batch, "weights": batch["weights"].at[0, 0].set(jnp.nan)}),
        "NaN in the parameters": (replace(state, params={**state.params, "embedding": nan_embedding}), batch),
        "infinite predictor": (replace(state, params={**state.params, "groups": groups}), batch),
    }


@pytest.mark.parametrize("poison", ["infinite weight", "NaN weight", "NaN in the parameters", "infinite predictor"])
@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    poison: str, tiny_state: TrainState, tiny_batch: Batch, tiny_step: Step
) -> None:
    before, _ = tiny_step(tiny_state, tiny_batch)
    state, batch = poisons(before, tiny_batch)[poison]
    after, metrics = tiny_step(state, batch)
    assert_same_bits((after.params, after.opt_state), (state.params, state.opt_state))
    assert counts(after) == (2, 1, 1)
    assert [metrics[name] for name in ("finite", "skipped", "streak")] == [0, 1, 1]
    again, _ = tiny_step(after, batch)
    assert counts(again) == (3, 2, 2)
    # Then a good one: the streak ends, the count stays, and the optimizer goes on as if nothing had been.
    good, metrics = tiny_step(replace(again, params=before.params), tiny_batch)
    assert counts(good) == (4, 2, 0)
    assert [metrics[name] for name in ("finite", "skipped", "streak")] == [1, 2, 0]
    expected, _ = tiny_step(before, tiny_batch)
    assert_same_bits((good.params, good.opt_state), (expected.params, expected.opt_state))


@dataclass(frozen=True)
class Trained:
    """A compiled step, the state it began with, and what three steps on the batch gave."""

    step: Step
    start: TrainState
    state: TrainState
    metrics: Metrics


@pytest.fixture(scope="module")
def trained(
    routed_run: RunConfig, tiny_batch: Batch, random_state: Callable[..., TrainState]
) -> Callable[..., Trained]:
    """The smallest model with changed fields, each variant compiled once."""
    done: dict[str, Trained] = {}

    def with_fields(options: Any = None, **groups: dict[str, Any]) -> Trained:
        name = repr((options, groups))
        if name not in done:
            run = changed(routed_run, **groups)
            step, start = jitted(run, options), random_state(run)
            state = start
            for _ in range(3):
                state, metrics = step(state, tiny_batch)
            done[name] = Trained(step, start, state, metrics)
        return done[name]

    return with_fields


@pytest.mark.slow
def test_accumulation_gives_the_same_update(trained: Callable[..., Trained]) -> None:
    """Although the rows have different numbers of weighted and of valid tokens."""
    whole, parts = trained(), trained(train={"accumulation": 2})
    expected = flat(whole.state.params)
    for name, leaf in flat(parts.state.params).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=2e-5, err_msg=name)
    assert parts.metrics.keys() == whole.metrics.keys()
    for name, value in parts.metrics.items():
        np.testing.assert_allclose(value, whole.metrics[name], rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_targets_without_weight_teach_nothing(tiny_step: Step, tiny_state: TrainState, tiny_batch: Batch) -> None:
    """As of a conversation, of which only the answers are learned."""
    learned = jnp.asarray(np.random.default_rng(0).random(tiny_batch["weights"].shape) < 0.4) & (
        tiny_batch["weights"] > 0
    )
    batch = tiny_batch | {"weights": learned.astype(jnp.float32)}
    other = batch | {"targets": jnp.where(learned, batch["targets"], (batch["targets"] + 1) % 29)}
    (state, metrics), (same, others) = tiny_step(tiny_state, batch), tiny_step(tiny_state, other)
    assert_same_bits(state.params, same.params)
    assert_same_bits(metrics, others)
    whole, _ = tiny_step(tiny_state, tiny_batch)
    assert any(np.any(a != b) for a, b in zip(flat(state.params).values(), flat(whole.params).values(), strict=True))


def language_model(state: TrainState) -> dict[str, np.ndarray]:
    return {name: leaf for name, leaf in flat(state.params).items() if "predictor" not in name}


@pytest.mark.nightly
def test_the_predictor_costs_the_language_model_nothing_to_the_bit(trained: Callable[..., Trained]) -> None:
    light, heavy = (trained(AS_SHIPPED, routing={"auxiliary_weight": weight}).state for weight in (0.01, 1.0))
    assert_same_bits(language_model(light), language_model(heavy))
    predictor = lambda state: state.params["groups"]["routed"]["predictor"]["hidden"]  # noqa: E731
    assert np.any(predictor(light) != predictor(heavy)), "the weight does something"


@pytest.mark.slow
def test_the_loss_on_the_routers_own_logit_does_cost_it(trained: Callable[..., Trained]) -> None:
    light, heavy = (
        language_model(trained(routing={"causal_rule": "router", "auxiliary_weight": weight}).state)
        for weight in (0.01, 1.0)
    )
    assert all(np.any(light[name] != heavy[name]) for name in light)


STOCHASTIC: dict[str, Any] = {"routing": {"selection": "stochastic"}, "optimizer": {"warmup_steps": 10}}


@pytest.mark.slow
def test_the_rate_does_not_move_on_in_a_skipped_step(tiny_batch: Batch, trained: Callable[..., Trained]) -> None:
    step, state = trained(**STOCHASTIC).step, trained(**STOCHASTIC).start
    bad = {**tiny_batch, "weights": tiny_batch["weights"] * jnp.nan}
    rates = []
    for batch in (tiny_batch, bad, bad, tiny_batch):
        state, metrics = step(state, batch)
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [0.001, 0.002, 0.002, 0.002], rtol=1e-5)


def test_stochastic_routing_draws_anew_at_every_step_but_the_same_at_the_same(
    tiny_batch: Batch, trained: Callable[..., Trained]
) -> None:
    step, state = trained(**STOCHASTIC).step, trained(**STOCHASTIC).start
    losses = [float(step(replace(state, step=jnp.int32(t)), tiny_batch)[1]["lm_loss"]) for t in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    other = replace(state, key=jax.random.key(99))
    assert float(step(other, tiny_batch)[1]["lm_loss"]) != losses[0]


@pytest.mark.slow
def test_stochastic_routing_selects_by_noise_for_each_row_and_trains_no_rule(
    routed_run: RunConfig, tiny_batch: Batch, trained: Callable[..., Trained]
) -> None:
    result = trained(**STOCHASTIC)
    assert "auxiliary_loss" not in result.metrics and "predictor" not in result.state.params["groups"]["routed"]
    np.testing.assert_allclose(result.metrics["routed_fraction"], 18 / 71, rtol=1e-6)
    routing = changed(routed_run, **STOCHASTIC).routing
    decoder, params = Decoder(routed_run.model, routing), result.start.params
    rows = {name: jnp.tile(a[:1], (64, 1)) for name, a in tiny_batch.items()}
    modes: tuple[RoutingMode, ...] = ("top_k", "causal")
    run: Any = jax.jit(lambda key: [forward(decoder, params, rows, key, mode).trace for mode in modes])
    top, causal = run(jax.random.key(0))
    assert np.all(np.sum(top.selected, -1) == 6)
    by_score = np.argsort(-np.asarray(top.scores[0, 0]))[:6]
    assert set(by_score) != set(np.flatnonzero(top.selected[0, 0]))
    assert len({tuple(row) for row in np.asarray(top.selected[:, 0])}) > 60, "rows differ"
    assert np.any(run(jax.random.key(1))[0].selected != top.selected), "keys differ"
    share = np.mean(causal.selected | causal.overflow)
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / (64 * 24)), "about capacity"


@pytest.mark.slow
def test_evaluation_equals_naive_sums_under_both_routings(
    tiny_run: RunConfig, tiny_state: TrainState, tiny_batch: Batch, tiny_outputs: dict[str, Output]
) -> None:
    step = jax.jit(make_eval_step(Decoder(tiny_run.model, tiny_run.routing), tiny_run))
    params = tiny_state.params
    halves = [{name: a[rows] for name, a in tiny_batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    record = summarise_eval(jax.tree.map(jnp.add, *[step(params, half, jax.random.key(0)) for half in halves]))
    losses = [mean_nll(tiny_outputs[mode].hidden, params, tiny_batch) for mode in ("top_k", "causal")]
    np.testing.assert_allclose(record["eval_loss"], losses[0], rtol=1e-5)
    np.testing.assert_allclose(record["eval_loss_causal"], losses[1], rtol=1e-5)
    np.testing.assert_allclose(record["causal_gap"], losses[1] - losses[0], rtol=1e-3)
    assert abs(record["causal_gap"]) > 1e-3
    top, causal = (tiny_outputs[mode].trace for mode in ("top_k", "causal"))
    assert top is not None and causal is not None
    valid = np.asarray(tiny_batch["segment_ids"])[:, None] > 0
    right = ((np.asarray(top.logits) > 0) == np.asarray(top.selected)) & valid
    np.testing.assert_allclose(record["eval_predictor_accuracy"], right.sum() / 71 / 2, rtol=1e-6)
    np.testing.assert_allclose(record["eval_routed_fraction"], np.sum(causal.selected, (0, 2)) / 71, rtol=1e-6)
    np.testing.assert_allclose(record["eval_overflow"], np.sum(causal.overflow, (0, 2)) / 71, rtol=1e-6)
    assert sum(record["eval_overflow"]) > 0 and all(isinstance(v, float | list) for v in record.values())


def test_a_dense_model_has_a_loss_and_no_routing_metrics(
    tiny_run: RunConfig, tiny_batch: Batch, random_state: Callable[..., TrainState]
) -> None:
    run = changed(tiny_run, model={"layers": 1}, routing={"every": 0})
    state, decoder = random_state(run), Decoder(run.model, run.routing)
    after, metrics = jax.eval_shape(make_train_step(decoder, run, 100), state, tiny_batch)
    assert metrics.keys() == {"loss", "lm_loss", "grad_norm", "learning_rate", "finite", "skipped", "streak"}
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    evaluate = make_eval_step(decoder, run)
    sums, hidden = jax.jit(lambda p, b: (evaluate(p, b, jax.random.key(0)), forward(decoder, p, b, None).hidden))(
        state.params, tiny_batch
    )
    record = summarise_eval(sums)
    np.testing.assert_allclose(record["eval_loss"], mean_nll(hidden, state.params, tiny_batch), rtol=1e-5)
    assert record.keys() == {"eval_loss"}


@pytest.mark.slow
def test_the_first_state_counts_from_zero_and_its_key_is_not_the_parameters(
    routed_run: RunConfig, random_state: Callable[..., TrainState]
) -> None:
    state: Any = jax.jit(lambda: init_state(Decoder(routed_run.model, routed_run.routing), routed_run, 10))()
    assert counts(state) == (0, 0, 0)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
    assert shapes(state) == shapes(random_state(routed_run, total_steps=10))
    assert np.any(jax.random.key_data(state.key) != jax.random.key_data(jax.random.key(routed_run.train.seed)))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def largest_float_array(text: str) -> int:
    """Elements of the largest floating-point array of any kind in a program's HLO."""
    shapes = re.findall(r"\b(?:f64|f32|f16|bf16|f8\w*)\[([\d,]+)\]", text)
    return max(int(np.prod([int(d) for d in dims.split(",")])) for dims in shapes)


@pytest.mark.nightly
def test_the_logits_of_all_tokens_never_exist(tiny_run: RunConfig) -> None:
    """At S 2,048, batch 8, V 49,152; compiled only. Width and depth don't matter to it and are tiny."""
    B, S, V = 8, 2048, 49_152
    model = ModelConfig(vocab_size=V, width=16, layers=1, heads=1, mlp_width=16, context=S)
    train = replace(tiny_run.train, batch_size=B, loss_chunk=128)
    run = RunConfig(model, RoutingConfig(every=1, predictor_width=8), train=train)
    decoder = Decoder(model, run.routing)
    state = jax.eval_shape(lambda: init_state(decoder, run, 10))
    batch = {n: jax.ShapeDtypeStruct((B, S), jnp.int32) for n in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = jax.ShapeDtypeStruct((B, S), jnp.float32)
    text = jitted(run).lower(state, batch).compile(AS_SHIPPED).as_text()
    assert largest_float_array(text) < B * S * V
    assert largest_float_array(text) == max(B * 128 * V, B * S * S), "a chunk of the logits, or attention"
    # The same search finds them where they are.
    naive = jax.jit(lambda h, w: jnp.mean(jax.nn.logsumexp(jnp.sin(h @ w.T), -1)))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(B, S, 16), (V, 16)]]
    assert largest_float_array(naive.lower(*shapes).compile(AS_SHIPPED).as_text() or "") >= B * S * V

"""The objective given thoughts: value and every gradient, against a naive loop that JAX differentiates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from thinking_models import Batch, Thinker, scores, thinking_params

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig
from mod_star.model import Decoder, Output
from mod_star.model.cross_entropy import cross_entropy_by_token
from mod_star.model.parts import DEFAULT_PARTS
from mod_star.model.routing import RoutingCall, Tokens
from mod_star.model.transformer import apply_blocks, head_matrix
from mod_star.thinking.mixing import mix, mixing_init, mixing_weight
from mod_star.thinking.objective import (
    Places,
    Talk,
    choose_places,
    place_count,
    predicted,
    talk_loss,
    talk_total,
)
from mod_star.thinking.parameters import thinking_init
from mod_star.thinking.rewards import advantages_of
from mod_star.thinking.sample import ThinkingDecoder
from mod_star.thinking.thought import Thought

MODEL = ModelConfig(vocab_size=29, width=16, layers=1, heads=2, kv_heads=1, mlp_width=24, context=8)
DENSE, ROUTED = RoutingConfig(every=0), RoutingConfig(every=1, capacity=0.25, predictor_width=8, headroom=8.0)
PAPER = ThinkingConfig(
    thought_length=2, n_true=2, n_thoughts=2, policy_temperature=3.0, talk_weight=0.7, policy_weight=1.3, chunk=2
)
UNBIASED = ThinkingConfig(
    thought_length=2, n_true=2, n_thoughts=3, baseline="leave_one_out", drop_negative=False, base_weight=0.0
)
# The second place of the first row is followed by one prediction only; the last two of the second row are not filled.
PLACES = Places(jnp.asarray([[1, 3, 6], [0, 4, 5]]), jnp.asarray([[True, True, False], [True, False, False]]))
DOCUMENTS = [[5, 3], [6]]


def make_case(routing: RoutingConfig, thinking: ThinkingConfig, random_params: Any, make_batch: Any) -> Any:
    """A model with its batch, and thoughts of random tokens."""
    config = RunConfig(MODEL, routing, thinking=thinking)
    thinker = Thinker(config, thinking_params(config, random_params(MODEL, routing)), make_batch(DOCUMENTS, 8, 29))
    shape = (2, 3, thinking.n_thoughts, 2)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 29, shape))
    decided = -jnp.ones((*shape[:3], 1, 2), jnp.int8) if routing.every else None  # the rule decides
    return thinker, Thought(tokens, jnp.zeros(shape), jnp.zeros(shape), decided)


@pytest.fixture(
    scope="module",
    params=[pytest.param((DENSE, PAPER, 5), id="dense paper", marks=pytest.mark.nightly),
            pytest.param((ROUTED, UNBIASED, 100), id="routed loo")],
)  # fmt: skip
def case(request: pytest.FixtureRequest, random_params: Any, make_batch: Any) -> tuple[Thinker, Thought, int]:
    """Model, thoughts, and the chunk of the loss; chunks of places are 2 of 3 and all."""
    routing, thinking, chunk = request.param
    return *make_case(routing, thinking, random_params, make_batch), chunk


@pytest.fixture(scope="module")
def gradient(case: tuple[Thinker, Thought, int]) -> Any:
    """`(params, batch) -> ((loss, talk), gradient)`"""
    thinker, thoughts, chunk = case

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, Talk]:
        text = replace(thinker, batch=batch).read(params)
        return talk_loss(thinker.thinks, params, text, batch, PLACES, thoughts, chunk)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def naive_loss(thinker: Thinker, params: Any, thoughts: Thought) -> jax.Array:
    """Algorithm 1, place by place: the plain decoder on [X_{<=j}; start; T; end; X...], all logits, autodiff."""
    thinking, head, own = thinker.run.thinking, head_matrix(params), params["thinking"]
    T, N, M = thinking.thought_length, thinking.n_true, thinking.n_thoughts
    tokens, targets, ids, weights = (
        np.asarray(thinker.batch[n]) for n in ("tokens", "targets", "segment_ids", "weights")
    )
    indices = np.asarray(PLACES.indices_BxJ)

    def hidden(x: jax.Array) -> jax.Array:
        count = len(x)
        tokens = Tokens(x, jnp.arange(count), jnp.ones(count, jnp.int32))
        call = RoutingCall(slots=count)
        return apply_blocks(thinker.decoder, params, tokens, call, keep_keys_values=False).hidden

    def mixing(base: jax.Array, thought: jax.Array) -> jax.Array:
        p = own["mixing"]
        x = jnp.maximum(jnp.concatenate([base, thought]) @ p["first"] + p["first_bias"], 0)
        return jnp.maximum(x @ p["second"] + p["second_bias"], 0) @ p["output"] + p["output_bias"]

    def log_softmax(logits: jax.Array, target: Any) -> jax.Array:
        return jax.nn.log_softmax(logits)[target]

    talk_sum = policy_sum = jnp.float32(0)
    predictions = 0
    places = list(zip(*np.nonzero(np.asarray(PLACES.filled_BxJ)), strict=True))
    for row, place in places:
        index = indices[row, place]
        document = np.flatnonzero(ids[row] == ids[row, index])
        at, text = index - document[0] + 1, params["embedding"][tokens[row, document]]
        ahead = [s for s in range(N) if index + s <= document[-1] and weights[row, index + s]]
        after = text[at:][: N - 1]
        base = hidden(text)

        def one(thought: jax.Array) -> tuple[jax.Array, jax.Array]:
            """log p of the predictions, their sum, and log p of the thought."""
            x = [text[:at], own["start"][None], params["embedding"][thought], own["end"][None], after]  # noqa: B023
            states = hidden(jnp.concatenate(x))
            log_p_thought = jnp.float32(0)
            for k in range(T):
                log_p_thought += log_softmax(head @ states[at + k] / thinking.policy_temperature, thought[k])  # noqa: B023
            likelihood = jnp.float32(0)
            for s in ahead:  # noqa: B023
                pair = base[at - 1 + s], states[at + T + 1 + s]  # noqa: B023
                w = mixing(*pair)
                mixed = (1 - w) * (head @ pair[0]) + w * (head @ pair[1])
                likelihood += log_softmax(mixed, targets[row, index + s])  # noqa: B023
            return likelihood, log_p_thought

        rewards, log_p_thoughts = jax.vmap(one)(thoughts.tokens_T[row, place])
        for m in range(M):
            others = jnp.mean(rewards if thinking.baseline == "mean" else jnp.delete(rewards, m))
            advantage = jax.lax.stop_gradient(rewards[m] - others)
            used = jnp.maximum(advantage, 0) if thinking.drop_negative else advantage
            policy_sum -= used * log_p_thoughts[m]
        talk_sum -= jnp.sum(rewards)
        predictions += len(ahead) * M
    return (thinking.talk_weight * talk_sum + thinking.policy_weight * policy_sum) / predictions


@pytest.mark.slow
def test_value_and_gradients_equal_a_naive_loop(case: tuple[Thinker, Thought, int], gradient: Any) -> None:
    thinker, thoughts, _ = case
    naive = jax.jit(jax.value_and_grad(lambda params: naive_loss(thinker, params, thoughts)))
    expected, expected_grads = naive(thinker.params)
    (loss, talk), grads = gradient(thinker.params, thinker.batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for (path, grad), other in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        scale = np.abs(other).max()
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(grad, other, rtol=1e-3, atol=1e-5 * scale + 1e-9, err_msg=name)
        assert scale > 0 or "predictor" in name
    if "routed" in thinker.params["groups"]:
        assert talk.computed_BxJxMxG.shape == (2, 3, 3, 1)
        assert 0 < np.mean(talk.computed_BxJxMxG) < 1, "some tokens are routed"
        assert not np.any(talk.overflow_BxJxMxG)


def test_it_equals_the_formula_of_what_it_reports(
    thinker: Thinker, thought_of: tuple[Places, Thought], scored: tuple[jax.Array, Talk]
) -> None:
    """On the larger case whose talk `test_naive_loop.py` checks."""
    (places, _), (loss, talk) = thought_of, scored
    filled, weights = np.asarray(places.filled_BxJ), np.asarray(thinker.batch["weights"])
    nll = np.asarray(talk.nll_BxJxMxN, np.float64)
    talk_sum = predictions = policy_sum = 0.0
    for b, j in zip(*np.nonzero(filled), strict=True):
        ids = np.asarray(thinker.batch["segment_ids"][b])
        counts = [weights[b, j + s] * (ids[j + s] == ids[j]) for s in range(3)]
        rewards = [-sum(counts * nll[b, j, m]) for m in range(2)]
        for m in range(2):
            advantage = rewards[m] - np.mean(rewards)
            np.testing.assert_allclose(talk.advantages_BxJxM[b, j, m], advantage, rtol=1e-4, atol=1e-4)
            policy_sum -= max(advantage, 0) * talk.log_probs_BxJxM[b, j, m]
            talk_sum -= rewards[m]
            predictions += sum(counts)
    np.testing.assert_allclose(loss, (talk_sum + policy_sum) / predictions, rtol=1e-5)


def test_a_batch_of_padding_and_of_documents_too_short_is_zero_and_finite(
    case: tuple[Thinker, Thought, int], gradient: Any, make_batch: Any
) -> None:
    thinker, _, _ = case
    padding = make_batch([[], []], 8, 29)
    (loss, talk), grads = gradient(thinker.params, padding)
    assert loss == 0
    for leaf in jax.tree.leaves((talk, grads)):
        assert np.all(np.isfinite(leaf))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    # Documents of one token predict nothing, whatever n_true is.
    (loss, _), grads = gradient(thinker.params, make_batch([[1] * 8, [1, 1, 1]], 8, 29))
    assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_predictions_end_with_the_document() -> None:
    ids = jnp.asarray([[1, 1, 2, 2, 2, 3, 0, 0]])
    weights = jnp.asarray([[1.0, 0, 1, 1, 0, 0, 0, 0]])
    thinking = ThinkingConfig(n_true=3, n_thoughts=4)
    places = Places(jnp.asarray([[0, 2, 3, 5]]), jnp.asarray([[True, True, True, False]]))
    batch = {"segment_ids": ids, "weights": weights}
    index, weights_BxJxN = predicted(batch, places, thinking)
    np.testing.assert_array_equal(index, [[[0, 1, 2], [2, 3, 4], [3, 4, 5], [5, 6, 7]]])
    np.testing.assert_array_equal(weights_BxJxN, [[[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]]])
    assert float(talk_total(batch, places, thinking)) == 16


NONE = Thought(jnp.zeros(0, jnp.int32), jnp.zeros(0), jnp.zeros(0), None)


def test_the_baseline_is_the_mean_of_all_or_of_the_others() -> None:
    likelihoods = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    ahead = np.random.default_rng(1).dirichlet(np.ones(5), (2, 3, 4)) * likelihoods[..., None]  # five tokens each
    of_all, of_others = (
        advantages_of(DEFAULT_PARTS, ThinkingConfig(n_thoughts=4, baseline=baseline), jnp.float32(ahead), NONE)
        for baseline in ("mean", "leave_one_out")
    )
    np.testing.assert_allclose(of_all, likelihoods - likelihoods.mean(-1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(of_all, of_others * 3 / 4, atol=1e-6)
    for m in range(4):
        others = np.delete(likelihoods, m, -1).mean(-1)
        np.testing.assert_allclose(of_others[..., m], likelihoods[..., m] - others, atol=1e-6)
    alone = ThinkingConfig(n_thoughts=1, policy_weight=0, baseline="leave_one_out")
    np.testing.assert_array_equal(advantages_of(DEFAULT_PARTS, alone, jnp.ones((2, 1, 1, 3)), NONE), 0)


@pytest.mark.slow
def test_without_reinforce_the_loss_is_that_of_the_text(random_params: Any, make_batch: Any) -> None:
    thinking = replace(PAPER, policy_weight=0.0)
    thinker, thoughts = make_case(DENSE, thinking, random_params, make_batch)
    loss, talk = scores(thinker.run)(thinker.params, thinker.batch, PLACES, thoughts)
    _, weights = predicted(thinker.batch, PLACES, thinking)
    nll = np.sum(talk.nll_BxJxMxN * weights[:, :, None]) / (np.sum(weights) * 2)
    np.testing.assert_allclose(loss, 0.7 * nll, rtol=1e-5)
    assert not np.any(talk.log_probs_BxJxM) and np.any(talk.advantages_BxJxM)


@pytest.mark.slow
def test_a_new_mixing_head_changes_nothing(
    thinker: Thinker, thought_of: tuple[Places, Thought], scored: tuple[jax.Array, Talk]
) -> None:
    new = mixing_init(jax.random.key(0), thinker.run.model)
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16):
        base, thought = (jnp.asarray(rng.normal(size=(50, 16)), dtype) for _ in range(2))
        weights = mixing_weight(new, base, thought)
        assert weights.dtype == jnp.float32 and not np.any(weights)
        np.testing.assert_array_equal(mix(base, thought, weights), base.astype(jnp.float32), strict=True)
        assert np.any(mix(base, thought, weights + 0.5) != base)
    params = {**thinker.params, "thinking": {**thinker.params["thinking"], "mixing": new}}
    places, thoughts = thought_of
    _, talk = scores(thinker.run)(params, thinker.batch, places, thoughts)
    assert not np.any(talk.weights_BxJxMxN) and not np.any(talk.advantages_BxJxM[..., 0] > 1e-5)

    @jax.jit
    def base_nll(params: Any, batch: Batch) -> jax.Array:
        text = replace(thinker, batch=batch).read(params)
        return cross_entropy_by_token(text.hidden, head_matrix(params), batch["targets"], batch["weights"], 10)[1]

    index, weights = predicted(thinker.batch, places, thinker.run.thinking)
    expected = np.take_along_axis(np.asarray(base_nll(params, thinker.batch))[:, :, None], np.asarray(index), 1)
    counts = np.asarray(weights) > 0
    for m in range(2):
        np.testing.assert_allclose(talk.nll_BxJxMxN[:, :, m][counts], expected[counts], rtol=1e-6, atol=1e-6)
    assert np.any(np.abs(scored[1].nll_BxJxMxN - talk.nll_BxJxMxN) > 0.1)


def test_start_and_end_begin_as_the_mean_embedding_of_their_text() -> None:
    embedding = jnp.asarray(np.random.default_rng(0).normal(size=(29, 16)), jnp.float32)
    params = thinking_init(jax.random.key(0), MODEL, embedding, [3, 3, 7], [5])
    np.testing.assert_allclose(params["start"], (2 * embedding[3] + embedding[7]) / 3, rtol=1e-6)
    np.testing.assert_array_equal(params["end"], embedding[5])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    shapes = {name: leaf.shape for name, leaf in params["mixing"].items()}
    assert shapes == {
        "first": (32, 16), "first_bias": (16,), "second": (16, 16), "second_bias": (16,), "output": (16,),
        "output_bias": (),
    }  # fmt: skip
    assert np.std(params["mixing"]["first"]) == pytest.approx(32**-0.5, rel=0.1)


DECODER = Decoder(MODEL, DENSE)


def text_of(hidden: jax.Array) -> Output:
    return Output(hidden, None, None)


@pytest.mark.slow
def test_all_positions_think_in_order_or_as_many_as_the_share_says(make_batch: Any) -> None:
    batch = make_batch([[13, 7], [24]], 24, 29)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 16)), jnp.float32)
    head = jnp.asarray(np.random.default_rng(1).normal(size=(29, 16)), jnp.float32)
    eligible = np.asarray(batch["weights"])[:, :22] > 0
    for where in ("entropy", "random"):
        thinking = ThinkingConfig(n_true=3, think_where=where)  # type: ignore[arg-type]
        places = choose_places(ThinkingDecoder(DECODER, thinking), batch, text_of(hidden), head, jax.random.key(0), 10)
        np.testing.assert_array_equal(places.indices_BxJ, [np.arange(22)] * 2)
        np.testing.assert_array_equal(places.filled_BxJ, eligible)
    counts = {share: place_count(replace(thinking, think_fraction=share), 24) for share in (1e-6, 0.1, 0.25, 0.5, 1.0)}
    assert counts == {1e-6: 1, 0.1: 2, 0.25: 6, 0.5: 11, 1.0: 22}, "of 22, rounded half up, at least one"

    half = replace(thinking, think_fraction=0.5)
    by_entropy = ThinkingDecoder(DECODER, replace(half, think_where="entropy"))
    places = choose_places(by_entropy, batch, text_of(hidden), head, jax.random.key(0), 10)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1)[:, :22]
    for row in range(2):
        best = sorted(np.flatnonzero(eligible[row]), key=lambda i: -entropy[row, i])[: (10, 11)[row]]
        np.testing.assert_array_equal(places.indices_BxJ[row][places.filled_BxJ[row]], sorted(best))
    np.testing.assert_array_equal(places.filled_BxJ.sum(1), [10, 11], "half of 20, and of 22: padding has no share")

    by_chance = ThinkingDecoder(DECODER, half)
    draw = jax.jit(jax.vmap(lambda key: choose_places(by_chance, batch, text_of(hidden), head, key, 10)))
    many = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), 2000)))
    assert np.all(np.diff(many.indices_BxJ) > 0) and np.all(np.sum(many.filled_BxJ, -1) == [10, 11])
    for row in range(2):
        often = np.bincount(many.indices_BxJ[:, row][many.filled_BxJ[:, row]], minlength=22)
        share = (10 + row) / eligible[row].sum()
        assert not np.any(often[~eligible[row]])
        deviations = (often[eligible[row]] - 2000 * share) / np.sqrt(2000 * share * (1 - share))
        assert np.all(np.abs(deviations) < 4.5) and np.std(deviations) > 0.5
    assert len({row.tobytes() for row in np.asarray(many.indices_BxJ[:, 0])}) > 1900

    short = make_batch([[4], []], 24, 29)
    whole = replace(half, think_fraction=1.0)
    for thinking in (half, replace(half, think_where="entropy"), whole):
        places = choose_places(ThinkingDecoder(DECODER, thinking), short, text_of(hidden), head, jax.random.key(0), 10)
        chosen = places.indices_BxJ[0][places.filled_BxJ[0]].tolist()
        assert not np.any(places.filled_BxJ[1]) and set(chosen) <= {0, 1, 2}
        assert len(chosen) == (3 if thinking is whole else 2), "of four positions"


@pytest.mark.nightly
def test_a_budget_does_not_change_what_is_thought_at_a_place(random_params: Any, make_batch: Any) -> None:
    def think(thinking: ThinkingConfig) -> tuple[Places, Thought]:
        thinker, _ = make_case(ROUTED, thinking, random_params, make_batch)
        result: Any = jax.jit(lambda params: thinker.think(params, jax.random.key(4), 4.0))(thinker.params)
        return result

    _, all_thoughts = think(UNBIASED)
    places, thoughts = think(replace(UNBIASED, think_fraction=0.5))
    assert places.indices_BxJ.shape == (2, 4) and places.filled_BxJ.sum(1).tolist() == [4, 3]
    filled = np.asarray(places.filled_BxJ)
    at = (np.nonzero(filled)[0], np.asarray(places.indices_BxJ)[filled])
    assert thoughts.decided_GxT is not None and all_thoughts.decided_GxT is not None
    np.testing.assert_array_equal(thoughts.tokens_T[filled], all_thoughts.tokens_T[at])
    np.testing.assert_array_equal(thoughts.decided_GxT[filled], all_thoughts.decided_GxT[at])
    np.testing.assert_allclose(thoughts.log_probs_T[filled], all_thoughts.log_probs_T[at], rtol=1e-5, atol=1e-5)
    assert len(np.unique(np.asarray(thoughts.tokens_T).reshape(-1, 2), axis=0)) > 12

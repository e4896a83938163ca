"""Latent thoughts: value and gradient against a naive loop, decoding against scoring, and what they cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch, random_params
from decoding_models import make_generator
from thinking_models import Thinker, thinking_params

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig
from mod_star.decoding import GenerationConfig, Sampling, Think
from mod_star.errors import InputError
from mod_star.flops import sampling_flops, scoring_flops
from mod_star.model.parts import DEFAULT_PARTS, LatentInput, Parts
from mod_star.model.routing import RoutingCall, Tokens
from mod_star.model.transformer import apply_blocks, head_matrix
from mod_star.thinking.objective import predicted
from mod_star.thinking.thought import expected_embedding, last_hidden

MODEL = ModelConfig(vocab_size=29, width=16, layers=1, heads=2, kv_heads=1, mlp_width=24, context=8)
DENSE, ROUTED = RoutingConfig(every=0), RoutingConfig(every=1, capacity=0.25, predictor_width=8, headroom=8.0)
THINKING = ThinkingConfig(thought_length=3, n_true=2, n_thoughts=1, policy_weight=0.0, kind="latent", chunk=3)
LENGTH = 8 + 1 + 3 + 1 + 1


def make_thinker(routing: RoutingConfig, kind: str, parts: Parts = DEFAULT_PARTS) -> Thinker:
    run = RunConfig(MODEL, routing, thinking=replace(THINKING, kind=kind))  # type: ignore[arg-type]
    params = thinking_params(run, random_params(MODEL, routing, parts))
    return Thinker(run, params, make_batch([[5, 3], [6]], 8, 29), parts)


def naive(thinker: Thinker, params: Any) -> tuple[jax.Array, jax.Array]:
    """The loss and the NLL of each prediction, in the order of rows, places and predictions.

    Place by place: the plain decoder on [X_{<=j}; <start>; x_1 ... x_t; <end>; X...], once for every x that it gives.
    """
    thinking, own, head = thinker.run.thinking, params["thinking"], head_matrix(params)
    t, N = thinking.thought_length, thinking.n_true

    def hidden(x_LxD: jax.Array) -> jax.Array:
        tokens = Tokens(x_LxD, jnp.arange(LENGTH), jnp.ones(LENGTH, jnp.int32))
        call = RoutingCall(slots=LENGTH)
        return apply_blocks(thinker.decoder, params, tokens, call, keep_keys_values=False).hidden

    def mixing(base: jax.Array, thought: jax.Array) -> jax.Array:
        p = own["mixing"]
        x = jnp.maximum(jnp.concatenate([base, thought]) @ p["first"] + p["first_bias"], 0)
        return jnp.maximum(x @ p["second"] + p["second_bias"], 0) @ p["output"] + p["output_bias"]

    def place(tokens_S: jax.Array, at: jax.Array, targets_N: jax.Array) -> jax.Array:
        """NLL of N predictions after the thought that follows `at` tokens of a document."""
        text_SxD = params["embedding"][tokens_S]
        base_LxD = hidden(jnp.zeros((LENGTH, MODEL.width)).at[: len(tokens_S)].set(text_SxD))
        x_LxD = jnp.where(jnp.arange(LENGTH)[:, None] < at, jnp.pad(text_SxD, ((0, LENGTH - 8), (0, 0))), 0)
        x_LxD = x_LxD.at[at].set(own["start"])

        def step(x_LxD: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            h_D = hidden(x_LxD)[at + i]
            return x_LxD.at[at + 1 + i].set(h_D), None

        x_LxD, _ = jax.lax.scan(step, x_LxD, jnp.arange(t))
        x_LxD = x_LxD.at[at + t + 1].set(own["end"])
        for s in range(N - 1):
            x_LxD = x_LxD.at[at + t + 2 + s].set(text_SxD[at + s])
        after_LxD, nlls = hidden(x_LxD), []
        for s in range(N):
            pair = base_LxD[at - 1 + s], after_LxD[at + t + 1 + s]
            w = mixing(*pair)
            nlls.append(-jax.nn.log_softmax(head @ ((1 - w) * pair[0] + w * pair[1]))[targets_N[s]])
        return jnp.stack(nlls)

    tokens, targets, ids, weights = (
        np.asarray(thinker.batch[n]) for n in ("tokens", "targets", "segment_ids", "weights")
    )
    cases = []
    for row, index in zip(*np.nonzero(weights[:, : 8 - N + 1]), strict=True):
        document = np.flatnonzero(ids[row] == ids[row, index])
        text = np.zeros(8, np.int32)
        text[: len(document)] = tokens[row, document]
        counts = weights[row, index : index + N] * (ids[row, index : index + N] == ids[row, index])
        cases.append((text, index - document[0] + 1, targets[row, index : index + N], counts))
    texts, ats, all_targets, counts = (jnp.asarray(np.stack(each)) for each in zip(*cases, strict=True))
    nll = jax.vmap(place)(texts, ats, all_targets)
    return jnp.sum(nll * counts) / counts.sum(), jnp.where(counts > 0, nll, 0.0)


@pytest.mark.slow
def test_value_and_gradient_equal_a_naive_loop_that_jax_differentiates() -> None:
    thinker = make_thinker(ROUTED, "latent")

    @jax.jit
    def ours(params: Any) -> Any:
        places, thoughts = thinker.think(params, jax.random.key(1))
        (loss, talk), grads = jax.value_and_grad(thinker.score, has_aux=True)(params, places, thoughts)
        return places, loss, talk, grads

    places, loss, talk, grads = jax.device_get(ours(thinker.params))
    (expected, nlls), expected_grads = jax.device_get(
        jax.jit(jax.value_and_grad(lambda params: naive(thinker, params), has_aux=True))(thinker.params)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    _, weights = predicted(thinker.batch, places, thinker.run.thinking)
    found = np.where(weights > 0, talk.nll_BxJxMxN[:, :, 0], 0.0)[places.filled_BxJ]
    np.testing.assert_allclose(found, nlls, rtol=1e-4, atol=1e-4)
    assert not np.any(talk.log_probs_BxJxM)
    leaves = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True)
    for (path, grad), other in leaves:
        scale, name = np.abs(other).max(), jax.tree_util.keystr(path)
        np.testing.assert_allclose(grad, other, rtol=1e-3, atol=1e-4 * scale + 1e-9, err_msg=name)
        assert scale > 0 or "predictor" in name
    share = talk.computed_BxJxMxG[places.filled_BxJ]
    assert 0 < share.mean() < 1, "some tokens are routed"


@pytest.mark.nightly
def test_what_is_generated_is_scored_the_same() -> None:
    """Token by token, routed, with a thought before each: the log-probabilities that scoring gives of the same text."""
    thinker = make_thinker(ROUTED, "expected")
    think = Think("auto", -np.inf)
    generator = make_generator(thinker.decoder, thinker.params, thinking=thinker.run.thinking)
    results = generator.generate([[3, 1, 4], [2]], GenerationConfig(4, Sampling(0.9), think=think))
    texts = [[3, 1, 4, *results[0].tokens], [2, *results[1].tokens]]
    batch: dict[str, Any] = {name: np.zeros((2, 8), np.int32) for name in ("tokens", "targets", "segment_ids")}
    for row, text in enumerate(texts):
        batch["tokens"][row, : len(text)], batch["segment_ids"][row, : len(text)] = text, 1
        batch["targets"][row, : len(text) - 1] = text[1:]
    weights = np.array([[n < len(text) - 1 for n in range(8)] for text in texts], np.float32)
    batch |= {"positions": np.tile(np.arange(8), (2, 1)), "weights": weights}
    scorer = replace(thinker, batch={name: jnp.asarray(values) for name, values in batch.items()})
    places, _, talk = jax.jit(lambda params: (
        (both := scorer.think(params, jax.random.key(0)))[0], both[1], scorer.score(params, *both)[1]
    ))(thinker.params)  # fmt: skip
    for row, (result, first) in enumerate(zip(results, (2, 0), strict=True)):
        place = {int(index): number for number, index in enumerate(places.indices_BxJ[row])}
        assert result.thoughts == [[]] * 4
        for step in range(4):
            number = place.get(first + step)
            if number is None or not places.filled_BxJ[row, number]:
                assert first + step == 6, "n_true tokens must follow"
                continue
            np.testing.assert_allclose(-talk.nll_BxJxMxN[row, number, 0, 0], result.log_probs[step], atol=1e-4)
            weight = result.mixing_weights[step]
            assert weight is not None
            np.testing.assert_allclose(talk.weights_BxJxMxN[row, number, 0, 0], weight, rtol=1e-4, atol=1e-4)


def test_the_expected_embedding_is_the_mean_under_the_prediction() -> None:
    rng = np.random.default_rng(0)
    hidden, embedding, head = (rng.standard_normal(shape) for shape in (5, (11, 5), (11, 5)))
    p = np.exp(head @ hidden) / np.sum(np.exp(head @ hidden))
    params = {"embedding": jnp.float32(embedding), "head": jnp.float32(head)}
    np.testing.assert_allclose(expected_embedding(params, jnp.float32(hidden)), p @ embedding, rtol=1e-5, atol=1e-6)


def test_a_feed_back_of_ones_own() -> None:
    """It is refused by name if it is no good; its FLOPs are counted."""
    wrong = make_thinker(DENSE, "latent", Parts(thought=LatentInput(lambda params, hidden_D: hidden_D[:3])))
    with pytest.raises(InputError, match=r"^parts\.thought\.feed_back = float32\[3\]: must be float32\[16\]"):
        jax.eval_shape(wrong.score, wrong.params, *jax.eval_shape(wrong.think, wrong.params, jax.random.key(0)))
    run = make_thinker(DENSE, "latent").run
    matrix = Parts(
        thought=LatentInput(lambda params, hidden_D: params["embedding"].T @ (params["embedding"] @ hidden_D))
    )
    places, steps = 7, 3
    extra = scoring_flops(run, 8, matrix).total - scoring_flops(run, 8, Parts(thought=LatentInput(last_hidden))).total
    assert extra == pytest.approx(4 * places * steps * 2 * 2 * 16 * 29, rel=0.05)
    expected = replace(run, thinking=replace(run.thinking, kind="expected"))
    assert scoring_flops(expected, 8).total - scoring_flops(run, 8).total == 4 * places * steps * 2 * 2 * 16 * 29
    assert sampling_flops(run, 8).total == 0

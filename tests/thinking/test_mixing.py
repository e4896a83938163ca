"""What a thought changes survives bfloat16 at the small mixing weights that every training begins with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch, random_params
from decoding_models import make_model
from thinking_models import Thinker, thinking_params

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig
from mod_star.decoding.think import Think
from mod_star.evaluation.scoring import ScoringConfig, score
from mod_star.inspection.thoughts import _think_everywhere
from mod_star.model import Decoder
from mod_star.model.cross_entropy import cross_entropy_by_token
from mod_star.model.transformer import head_matrix
from mod_star.thinking.mixing import mix, mixed_cross_entropy_by_token, mixed_logits
from mod_star.thinking.objective import Places, memory_of, predicted
from mod_star.thinking.sample import Place
from mod_star.thinking.score import score_thought
from mod_star.thinking.thought import Thought

RUN = RunConfig(
    ModelConfig(vocab_size=29, width=16, layers=1, heads=2, kv_heads=1, mlp_width=24, context=24, dtype="bfloat16"),
    RoutingConfig(every=0),
    thinking=ThinkingConfig(thought_length=2, n_true=2, n_thoughts=4, chunk=8),
)
WEIGHTS = (0.003, 0.03)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def with_weight(params: Any, weight: float) -> Any:
    """`params` with a mixing head that always says `weight`."""
    mixing = params["thinking"]["mixing"]
    mixing = {**mixing, "output": 0 * mixing["output"], "output_bias": jnp.float32(weight)}
    return {**params, "thinking": {**params["thinking"], "mixing": mixing}}


@pytest.fixture(scope="module")
def thinker() -> Thinker:
    params = thinking_params(RUN, random_params(RUN.model, RUN.routing))
    return Thinker(RUN, params, make_batch([[13, 7], [24], [11, 13], [24]], 24, 29))


@pytest.mark.slow
def test_the_signs_of_advantages_are_those_of_a_float32_mixture(thinker: Thinker) -> None:
    """Against a mixture in float64 of the same hidden states, in the objective itself."""
    rng, thinking, S = np.random.default_rng(0), RUN.thinking, 24
    B, M, T, N = 4, thinking.n_thoughts, thinking.thought_length, thinking.n_true
    J = S - N
    places = Places(jnp.asarray([np.arange(J)] * B, jnp.int32), jnp.ones((B, J), bool))
    none = jnp.zeros((B, J, M, T), jnp.float32)
    thoughts = Thought(jnp.asarray(rng.integers(0, 29, (B, J, M, T)), jnp.int32), none, none, None)

    @jax.jit
    def talk(params: Any) -> Any:
        return thinker.score(params, places, thoughts)[1]

    @jax.jit
    def hidden(params: Any) -> Any:
        text, batch = thinker.read(params), thinker.batch

        def one(context: Any, tokens: Any, positions: Any, ids: Any, index: Any, thought: Any) -> Any:
            following = tokens[index + 1 + jnp.arange(N - 1)]
            place = Place(positions[index], ids[index])
            return score_thought(thinker.thinks, params, context, place, thought, following).talk_NxD

        by_thought = jax.vmap(one, (None, None, None, None, None, 0))
        by_place = jax.vmap(by_thought, (None, None, None, None, 0, 0))
        arrays = (memory_of(text), batch["tokens"], batch["positions"], batch["segment_ids"])
        return text.hidden, jax.vmap(by_place)(*arrays, places.indices_BxJ, thoughts)

    base_BxSxD, talk_BxJxMxNxD = (np.asarray(each, np.float64) for each in hidden(thinker.params))
    index, weights = (np.asarray(each) for each in predicted(thinker.batch, places, thinking))
    head = np.asarray(head_matrix(thinker.params).astype(jnp.bfloat16), np.float64)
    base = base_BxSxD[np.arange(B)[:, None, None], index] @ head.T
    targets = np.asarray(thinker.batch["targets"])[np.arange(B)[:, None, None], index]
    for weight in WEIGHTS:
        logits = base[:, :, None] + weight * (talk_BxJxMxNxD @ head.T - base[:, :, None])
        log_p = np.take_along_axis(log_softmax(logits), targets[:, :, None, :, None], -1)[..., 0]
        reward = (log_p * weights[:, :, None]).sum(-1)
        expected = reward - reward.mean(-1, keepdims=True)
        advantages = np.asarray(talk(with_weight(thinker.params, weight)).advantages_BxJxM)
        there = np.abs(expected) > 0
        assert there.sum() > 200
        assert np.all(np.sign(advantages[there]) == np.sign(expected[there])), f"w = {weight}"
        np.testing.assert_allclose(advantages, expected, rtol=1e-2, atol=2e-6)


def pair_of(rows: int, spread: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states without and with a thought, bfloat16 2 x rows x 16, and a head."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal((2, rows, 16))
    thought = base + spread * rng.standard_normal((2, rows, 16))
    head = jnp.asarray(rng.normal(size=(29, 16)), jnp.float32)
    return jnp.asarray(base, jnp.bfloat16), jnp.asarray(thought, jnp.bfloat16), head


def test_a_rounded_mixture_would_get_signs_wrong() -> None:
    """What the test above is for: the same with hidden states mixed and rounded."""
    base, thought, head = pair_of(1000, 0.1)
    targets, ones = jnp.zeros((2, 1000), jnp.int32), jnp.ones((2, 1000), jnp.float32)

    def gains(mixed: Any) -> np.ndarray:
        nll = [np.asarray(mixed(jnp.full((2, 1000), w, jnp.float32))[1], np.float64) for w in (0.0, 0.003)]
        return nll[0] - nll[1]

    def rounded(w: jax.Array) -> Any:
        mixture = jax.vmap(mix)(base, thought, w).astype(jnp.bfloat16)
        return cross_entropy_by_token(mixture, head, targets, ones, 64)

    narrow = np.asarray(head.astype(jnp.bfloat16), np.float64)
    logits = [np.asarray(each, np.float64) @ narrow.T for each in (base, thought)]
    log_p = [log_softmax(logits[0] + w * (logits[1] - logits[0]))[..., 0] for w in (0.0, 0.003)]
    expected = log_p[1] - log_p[0]
    ours = gains(lambda w: mixed_cross_entropy_by_token(base, thought, w, head, targets, ones, 64))
    wrong = [np.mean(np.sign(gain) != np.sign(expected)) for gain in (ours, gains(rounded))]
    assert wrong[0] < 0.005 and wrong[1] > 0.1, wrong


def test_value_and_gradients_are_those_of_the_formula() -> None:
    base, thought, head = pair_of(11)
    rng = np.random.default_rng(2)
    w, weights = (jnp.asarray(rng.normal(size=(2, 11)), jnp.float32) for _ in range(2))
    targets = jnp.asarray(rng.integers(0, 29, (2, 11)), jnp.int32)
    head = head.astype(jnp.bfloat16).astype(jnp.float32)

    def formula(base: jax.Array, thought: jax.Array, w: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        base, thought = (jnp.einsum("bsd,vd->bsv", each, head, precision="highest") for each in (base, thought))
        log_p = jax.nn.log_softmax(base + w[..., None] * (thought - base))
        nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        return 3 * jnp.sum(weights * nll), nll

    def ours(base: jax.Array, thought: jax.Array, w: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, nll = mixed_cross_entropy_by_token(base, thought, w, head, targets, weights, 4)
        return 3 * total, nll

    gradient = lambda f, *args: jax.jit(jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True))(*args)  # noqa: E731
    (total, nll), grads = gradient(ours, base, thought, w, head)
    (expected, by_token), expected_grads = gradient(formula, *(a.astype(jnp.float32) for a in (base, thought, w, head)))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(nll, by_token, rtol=1e-5, atol=1e-5)
    assert [grad.dtype for grad in grads] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    for grad, other, within in zip(grads, expected_grads, (2e-2, 2e-2, 1e-5, 2e-2), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(np.asarray(grad, np.float32), other, atol=within * scale)
    wide = [each.astype(jnp.float32) for each in (base, thought)]
    exact = mixed_cross_entropy_by_token(wide[0], wide[1], w, head, targets, weights, 4)
    np.testing.assert_allclose(exact[1], by_token, rtol=1e-5, atol=1e-5)


def test_logits_after_a_thought_are_mixed_in_float32() -> None:
    base, thought, head = pair_of(500, 0.1)
    logits = [
        np.asarray(each[0], np.float64) @ np.asarray(head.astype(jnp.bfloat16), np.float64).T
        for each in (base, thought)
    ]
    for weight in WEIGHTS:
        mixed = mixed_logits({"head": head}, base[0], thought[0], jnp.full(500, weight, jnp.float32))
        assert mixed.dtype == jnp.float32
        change = (np.asarray(mixed, np.float64) - logits[0]) / weight
        np.testing.assert_allclose(change, logits[1] - logits[0], atol=5e-6 / weight)


@pytest.mark.slow
def test_scores_and_thoughts_of_a_text_feel_a_small_weight(thinker: Thinker) -> None:
    """What a thought changes grows in proportion to a small w; rounded, it would be noise."""
    tokens, decoder = np.asarray(thinker.batch["tokens"][1]), Decoder(RUN.model, RUN.routing)

    def scores(weight: float) -> np.ndarray:
        params = with_weight(thinker.params, weight)
        pair = (tokens[:1].tolist(), tokens[1:].tolist())
        (scored,) = score(
            make_model(decoder, params, thinking=RUN.thinking), [pair], ScoringConfig(think=Think("always"))
        )
        return np.array(scored.log_probs)

    def of_text(weight: float) -> np.ndarray:
        arrays = (jnp.asarray(tokens), jnp.int32(24), jax.random.key(0))
        talk = _think_everywhere(decoder, with_weight(thinker.params, weight), RUN.thinking, 0.0, *arrays)
        return np.asarray(talk[1], np.float64)[:-1]

    for door in (scores, of_text):
        none, small, larger = (door(weight) for weight in (0.0, 0.001, 0.01))
        assert np.abs(larger - none).max() > 1e-3
        np.testing.assert_allclose(10 * (small - none), larger - none, rtol=0.15, atol=3e-5)

"""A user's own thought, mixing, reward and choice of places, each against something independent."""

from __future__ import annotations

from collections.abc import Callable
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
from mod_star.decoding import GenerationConfig, Sampling
from mod_star.decoding.think import Think
from mod_star.errors import InputError
from mod_star.flops import scoring_flops
from mod_star.initial_params import initial_params
from mod_star.model.parts import Part, Parts, ThoughtInput
from mod_star.model.routing import Tokens
from mod_star.model.transformer import apply_blocks, head_matrix
from mod_star.thinking.objective import Places, Talk, predicted
from mod_star.thinking.rewards import above_mean
from mod_star.thinking.thought import THOUGHT_INPUTS, Thought, embed_thought
from mod_star.tokenization import ByteTokenizer
from mod_star.training.objectives import quiet_star

MODEL = ModelConfig(vocab_size=29, width=16, layers=1, heads=2, kv_heads=1, mlp_width=24, context=16)
THINKING = ThinkingConfig(thought_length=3, n_true=2, n_thoughts=2, chunk=5)
RUN = RunConfig(MODEL, RoutingConfig(every=0), thinking=THINKING)


def make_thinker(parts: Parts, **fields: Any) -> Thinker:
    params = thinking_params(RUN, random_params(MODEL, RUN.routing))
    run = replace(RUN, thinking=replace(THINKING, **fields))
    return Thinker(run, params, make_batch([[9, 5], [16]], 16, 29), parts)


def think_and_score(thinker: Thinker) -> tuple[Places, Thought, jax.Array, Talk, Any]:
    """Places, thoughts, loss, talk and gradient of the loss, as NumPy arrays."""

    @jax.jit
    def both(params: Any, key: jax.Array) -> Any:
        places, thoughts = thinker.think(params, key)
        (loss, talk), grads = jax.value_and_grad(thinker.score, has_aux=True)(params, places, thoughts)
        return places, thoughts, loss, talk, grads

    result: tuple[Places, Thought, jax.Array, Talk, Any] = jax.device_get(both(thinker.params, jax.random.key(1)))
    return result


def continuous(params: Any, hidden_D: Any, logits_V: Any, key: Any, temperature: float) -> Any:
    """No token at all: the hidden state is read at the next step, through a matrix of its own."""
    return jnp.int32(-1), hidden_D.astype(jnp.float32)


def through_a_matrix(params: Any, tokens_N: Any, kept_NxD: Any) -> Any:
    return kept_NxD @ params["thinking"]["thought"]["matrix"]


CONTINUOUS = ThoughtInput(
    continuous, through_a_matrix, lambda key, config: {"matrix": jax.random.normal(key, (config.width, config.width))}
)


def with_matrix(thinker: Thinker) -> Thinker:
    assert CONTINUOUS.init is not None
    thinking = {**thinker.params["thinking"], "thought": CONTINUOUS.init(jax.random.key(3), MODEL)}
    return replace(thinker, params={**thinker.params, "thinking": thinking})


@pytest.mark.nightly
def test_a_continuous_thought_equals_the_naive_loop_and_has_nothing_to_reinforce() -> None:
    """One thought of hidden states, read back: step by step by the plain decoder over everything before it."""
    thinker = with_matrix(make_thinker(Parts(thought=CONTINUOUS)))
    places, thoughts, loss, talk, grads = think_and_score(thinker)
    assert thoughts.extra_T.shape == (*thoughts.tokens_T.shape, 16) and np.all(thoughts.tokens_T == -1)
    assert not np.any(thoughts.log_probs_T) and not np.any(talk.log_probs_BxJxM)
    params, own = thinker.params, thinker.params["thinking"]
    row, number = 1, 6
    index = int(places.indices_BxJ[row, number])
    own = jax.device_get(own)
    x = [*np.asarray(params["embedding"])[np.asarray(thinker.batch["tokens"][row, : index + 1])], own["start"]]

    @jax.jit
    def hidden_of(x_NxD: Any, valid_N: Any) -> Any:
        tokens = Tokens(x_NxD, jnp.arange(len(x_NxD)), valid_N)
        return apply_blocks(thinker.decoder, params, tokens, keep_keys_values=False).hidden

    def last_hidden(x: list[Any]) -> Any:
        """Padded to the longest text: one program for all."""
        longest = index + 1 + 1 + 3 + 1
        padded = np.zeros((longest, MODEL.width), np.float32)
        padded[: len(x)] = x
        return np.asarray(hidden_of(padded, np.int32(np.arange(longest) < len(x))))[: len(x)]

    for step in range(3):
        hidden = last_hidden(x)[-1]
        np.testing.assert_allclose(thoughts.extra_T[row, number, 0, step], hidden, rtol=1e-4, atol=1e-4)
        x.append(hidden @ own["thought"]["matrix"])
    after = last_hidden([*x, own["end"]])[-1]
    base = last_hidden(x[: index + 1])[-1]
    w = talk.weights_BxJxMxN[row, number, 0, 0]
    logits = np.asarray((1 - w) * base + w * after, np.float64) @ np.asarray(head_matrix(params), np.float64).T
    nll = np.log(np.sum(np.exp(logits))) - logits[thinker.batch["targets"][row, index]]
    np.testing.assert_allclose(talk.nll_BxJxMxN[row, number, 0, 0], nll, rtol=1e-4)
    assert np.any(grads["thinking"]["thought"]["matrix"]), "it is learned through what is read in scoring"

    silent = think_and_score(with_matrix(make_thinker(Parts(thought=CONTINUOUS), policy_weight=0.0)))
    np.testing.assert_array_equal(silent[2], loss)
    jax.tree.map(np.testing.assert_array_equal, silent[4], grads)


@pytest.mark.nightly
def test_only_tokens_that_are_drawn_have_log_probabilities() -> None:
    """A token where the prediction is uncertain, else a pause: scored as they were sampled."""
    sampled = THOUGHT_INPUTS["sampled"]
    assert isinstance(sampled, ThoughtInput)
    draw = sampled.draw

    def sometimes(params: Any, hidden_D: Any, logits_V: Any, key: Any, temperature: float) -> Any:
        token, extra = draw(params, hidden_D, logits_V, key, temperature)
        return jnp.where(token % 2 == 0, token, -1), extra

    thinker = make_thinker(Parts(thought=ThoughtInput(sometimes, embed_thought)), drop_negative=False)
    places, thoughts, loss, talk, _ = think_and_score(thinker)
    drawn = thoughts.tokens_T >= 0
    assert (
        0.2 < drawn.mean() < 0.8
        and np.all(thoughts.log_probs_T[drawn] < 0)
        and not np.any(thoughts.log_probs_T[~drawn])
    )
    filled = places.filled_BxJ
    np.testing.assert_allclose(talk.log_probs_BxJxM[filled], thoughts.log_probs_T.sum(-1)[filled], atol=2e-4)
    _, weights = (np.asarray(each) for each in predicted(thinker.batch, places, thinker.run.thinking))
    nll = np.sum(talk.nll_BxJxMxN * weights[:, :, None])
    reinforced = np.sum(talk.advantages_BxJxM * talk.log_probs_BxJxM * filled[..., None])
    np.testing.assert_allclose(loss, (nll - reinforced) / (weights.sum() * 2), rtol=1e-5)


@pytest.mark.slow
def test_a_reward_may_ask_a_price_for_surprise() -> None:
    def reward(log_likelihoods: Any, thoughts: Thought) -> Any:
        return above_mean(jnp.sum(log_likelihoods, -1) + 0.3 * jnp.sum(thoughts.log_probs_T, -1))

    thinker = make_thinker(Parts(reward=reward), drop_negative=False)
    places, thoughts, loss, talk, _ = think_and_score(thinker)
    _, weights = (np.asarray(each, np.float64) for each in predicted(thinker.batch, places, thinker.run.thinking))
    gains = -np.sum(talk.nll_BxJxMxN * weights[:, :, None], -1) + 0.3 * np.sum(thoughts.log_probs_T, -1)
    expected = gains - gains.mean(-1, keepdims=True)
    filled = places.filled_BxJ
    np.testing.assert_allclose(talk.advantages_BxJxM[filled], expected[filled], rtol=1e-4, atol=1e-5)
    nll = np.sum(talk.nll_BxJxMxN * weights[:, :, None])
    reinforced = np.sum(expected * talk.log_probs_BxJxM * filled[..., None])
    np.testing.assert_allclose(loss, (nll - reinforced) / (weights.sum() * 2), rtol=1e-5)


def constant_init(key: jax.Array, config: ModelConfig) -> Any:
    return {"weight": jnp.float32(0.25)}


def constant(params: Any, base_NxD: Any, thought_NxD: Any) -> Any:
    return jnp.full(base_NxD.shape[0], params["weight"])


CONSTANT = Parts(mixing=Part(constant_init, constant))


@pytest.mark.nightly
def test_a_mixing_of_ones_own_trains_and_generates() -> None:
    """As the built-in head does that always says the same weight."""
    own, ours = make_thinker(CONSTANT), make_thinker(Parts())
    head = ours.params["thinking"]["mixing"]
    head = {**head, "output": 0 * head["output"], "output_bias": jnp.float32(0.25)}
    with_mixing = lambda params, mixing: {**params, "thinking": {**params["thinking"], "mixing": mixing}}  # noqa: E731
    own = replace(own, params=with_mixing(own.params, constant_init(jax.random.key(0), MODEL)))
    ours = replace(ours, params=with_mixing(ours.params, head))
    (*first, grads), (*second, expected_grads) = think_and_score(own), think_and_score(ours)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    grad, expected = grads["thinking"]["mixing"]["weight"], expected_grads["thinking"]["mixing"]["output_bias"]
    np.testing.assert_allclose(grad, expected, rtol=1e-5)
    assert np.any(grad)
    generator = make_generator(own.decoder, own.params, thinking=THINKING)
    config = GenerationConfig(4, Sampling(temperature=0), think=Think("always"))
    (result,) = generator.generate([[1, 2, 3]], config)
    assert result.mixing_weights == [0.25] * 4
    run = replace(RUN, model=replace(MODEL, vocab_size=320), train=replace(RUN.train, objective="quiet_star"))
    initial = initial_params(replace(own, run=run).decoder, run, ByteTokenizer())
    assert set(initial["thinking"]["mixing"]) == {"weight"}
    ours_flops, own_flops = (scoring_flops(RUN, 16, parts).mixing for parts in (Parts(), CONSTANT))
    assert own_flops < ours_flops / 100


@pytest.mark.nightly
def test_places_of_ones_own_are_those_with_the_highest_scores() -> None:
    def late(batch: Any, hidden_BxCxD: Any, head_VxD: Any, key: Any, chunk: int) -> Any:
        assert batch["tokens"].shape == hidden_BxCxD.shape[:2] == (2, 15)
        return batch["positions"].astype(jnp.float32)

    thinker = make_thinker(Parts(where_to_think=late), think_fraction=0.4)
    places = think_and_score(thinker)[0]
    for row, best in enumerate(([3, 4, 5, 6, 7, 12], [9, 10, 11, 12, 13, 14])):
        # 0.4 of 14 and of 15 positions; the last token of a document predicts nothing
        assert places.indices_BxJ[row][places.filled_BxJ[row]].tolist() == best


no_array: Callable[..., Any] = lambda *arguments: [1.0]  # noqa: E731
wrong_shape: Callable[..., Any] = lambda *arguments: jnp.zeros(3)  # noqa: E731
BAD = {
    r"parts\.reward = float32\[3\]: must be float32\[2, 5, 2\]": Parts(reward=wrong_shape),
    r"parts\.mixing = float32\[3\]: must be float32\[\d+\]": Parts(mixing=Part(constant_init, wrong_shape)),
    r"parts\.where_to_think = float32\[3\]: must be float32\[2, 15\]": Parts(where_to_think=wrong_shape),
    r"parts\.thought\.draw = \w+: must be a pair \(token, extra\)": Parts(
        thought=ThoughtInput(wrong_shape, wrong_shape)
    ),
    r"parts\.thought\.draw token = float32\[\]: must be int32\[\]": Parts(
        thought=ThoughtInput(lambda *arguments: (jnp.float32(0), None), embed_thought)
    ),
    r"parts\.thought\.embed = float32\[3\]: must be float32\[1, 16\]": Parts(
        thought=ThoughtInput(lambda *arguments: (jnp.int32(0), None), wrong_shape)
    ),
    r"parts\.reward = list: must be an array float32": Parts(reward=no_array),
}


@pytest.mark.parametrize("message", BAD)
def test_a_part_that_is_no_good_is_named_before_anything_is_compiled(message: str) -> None:
    thinker = make_thinker(BAD[message], think_fraction=0.5)
    loss = quiet_star(thinker.decoder, thinker.run).loss
    with pytest.raises(InputError, match=message):
        jax.eval_shape(loss, thinker.params, thinker.batch, jax.random.key(0), 1.0, 1.0)

"""REINFORCE with all outcomes enumerated: with the others' mean as baseline it is unbiased, exactly.

And it is on the scale of the NLL after thoughts.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from thinking_models import Batch, Thinker, thinking_params

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig
from mod_star.model.routing import Tokens
from mod_star.model.transformer import apply_blocks, head_matrix
from mod_star.thinking.objective import Places, predicted, sample_thoughts, talk_loss
from mod_star.thinking.sample import ThinkingDecoder
from mod_star.thinking.thought import Thought

V, M = 5, 2
MODEL = ModelConfig(vocab_size=V, width=8, layers=1, heads=1, mlp_width=8, context=6)
THINKING = ThinkingConfig(
    thought_length=1, n_true=2, n_thoughts=M, talk_weight=0.0, policy_weight=3.0, baseline="leave_one_out",
    drop_negative=False,
)  # fmt: skip
# Two predictions follow the first place, one the second.
INDICES = (1, 4)
PLACES = Places(jnp.asarray([INDICES]), jnp.ones((1, 2), bool))


@pytest.fixture(scope="module")
def toy(random_params: Any, make_batch: Any) -> Thinker:
    config = RunConfig(MODEL, RoutingConfig(every=0), thinking=THINKING)
    params = thinking_params(config, random_params(MODEL, config.routing))
    params["embedding"] = params["embedding"] * 0.3  # so that no thought is nearly certain
    return Thinker(config, params, make_batch([[6]], 6, V))


def thought_log_p(thinker: Thinker, params: Any, tokens_S: jax.Array) -> jax.Array:
    """log p of every thought at both places, [2, V], by the plain decoder on [X_{<=j}; start]."""
    rows = []
    for index in INDICES:
        x = jnp.concatenate([params["embedding"][tokens_S[: index + 1]], params["thinking"]["start"][None]])
        N = index + 2
        output = apply_blocks(
            thinker.decoder, params, Tokens(x, jnp.arange(N), jnp.ones(N, jnp.int32)), keep_keys_values=False
        )
        rows.append(jax.nn.log_softmax(output.hidden[-1] @ head_matrix(params).T))
    return jnp.stack(rows)


@pytest.fixture(scope="module")
def policy(toy: Thinker) -> Any:
    """Probabilities [2, V] of thoughts."""
    log_p = jax.jit(lambda params, tokens: thought_log_p(toy, params, tokens))(toy.params, toy.batch["tokens"][0])
    assert np.exp(log_p).min() > 0.01 and np.exp(log_p).max() < 0.7
    return np.exp(np.asarray(log_p, np.float64))


OUTCOMES = np.asarray(list(itertools.product(range(V), repeat=2 * M))).reshape(-1, 1, 2, M, 1)
"""All 625 outcomes of sampling two thoughts at two places."""


@pytest.fixture(scope="module")
def estimate(toy: Thinker, policy: Any) -> Any:
    """By configuration: the expected gradient, and the likelihood of the text [625, place, M] after each outcome."""

    def expected(**fields: Any) -> Any:
        thinking = replace(THINKING, **fields)

        @jax.jit
        def all_of(params: Any, batch: Batch, outcomes: jax.Array) -> Any:
            def loss(params: Any, tokens: jax.Array) -> Any:
                zeros = jnp.zeros(tokens.shape)
                text = replace(toy, batch=batch).read(params)
                thoughts = Thought(tokens, zeros, zeros, None)
                return talk_loss(ThinkingDecoder(toy.decoder, thinking), params, text, batch, PLACES, thoughts, 10)

            return jax.vmap(jax.grad(loss, has_aux=True), (None, 0))(params, outcomes)

        grads, talk = all_of(toy.params, toy.batch, OUTCOMES)
        drawn = OUTCOMES[:, 0, :, :, 0]
        chances = np.prod(policy[np.arange(2)[:, None], drawn], (1, 2))
        np.testing.assert_allclose(chances.sum(), 1, rtol=1e-5)
        _, weights = predicted(toy.batch, PLACES, thinking)
        likelihoods = -np.sum(talk.nll_BxJxMxN[:, 0] * weights[0, :, None], -1)
        return jax.tree.map(lambda g: np.tensordot(chances, np.asarray(g, np.float64), 1), grads), likelihoods

    return expected


def flat(tree: Any) -> Any:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.nightly
def test_its_expectation_is_the_gradient_of_the_expected_likelihood(toy: Thinker, policy: Any, estimate: Any) -> None:
    estimated, likelihoods = estimate()
    of_thought = np.zeros((2, V))
    for place in range(2):
        for token in range(V):
            same = likelihoods[:, place][OUTCOMES[:, 0, place, :, 0] == token]
            np.testing.assert_allclose(same, same[0], rtol=1e-5)
            of_thought[place, token] = same[0]

    def objective(params: Any, tokens: jax.Array) -> jax.Array:
        """-E_T[log p(text | T)] per prediction (there are three), differentiable through p(T) alone; weighted."""
        return -3.0 * jnp.sum(jnp.exp(thought_log_p(toy, params, tokens)) * of_thought) / 3

    exact = flat(jax.jit(jax.grad(objective))(toy.params, toy.batch["tokens"][0]))
    scale = np.abs(exact).max()
    assert scale > 0.01
    np.testing.assert_allclose(flat(estimated), exact, atol=1e-4 * scale)
    # (With the mean of both thoughts as baseline it would be half of this: all advantages are.) Without the thoughts
    # below the baseline it is another one.
    biased = flat(estimate(drop_negative=True)[0])
    assert np.abs(biased - exact / 2).max() > 0.05 * scale and np.abs(biased - exact).max() > 0.05 * scale


@pytest.mark.nightly
def test_with_the_talk_loss_its_expectation_is_the_gradient_of_the_expected_talk_loss(
    toy: Thinker, policy: Any, estimate: Any
) -> None:
    """Weights 1 and 1. The expected loss is a sum over all outcomes, differentiated as a whole."""
    estimated = flat(estimate(talk_weight=1.0, policy_weight=1.0)[0])
    alone = replace(THINKING, talk_weight=1.0, policy_weight=0.0)

    def expected_loss(params: Any, batch: Batch, outcomes: jax.Array) -> jax.Array:
        text = replace(toy, batch=batch).read(params)
        log_p = thought_log_p(toy, params, batch["tokens"][0])

        def weighted(tokens: jax.Array) -> jax.Array:
            zeros = jnp.zeros(tokens.shape)
            thoughts = Thought(tokens, zeros, zeros, None)
            loss, _ = talk_loss(ThinkingDecoder(toy.decoder, alone), params, text, batch, PLACES, thoughts, 10)
            chances = jnp.take_along_axis(log_p, tokens[0, :, :, 0], 1)
            return jnp.exp(jnp.sum(chances)) * loss

        return jnp.sum(jax.vmap(weighted)(outcomes))

    exact = flat(jax.jit(jax.grad(expected_loss))(toy.params, toy.batch, OUTCOMES))
    # What REINFORCE has to add to the gradient for given thoughts is small beside it: the scale to be exact on.
    given_thoughts = flat(estimate(talk_weight=1.0, policy_weight=0.0)[0])
    scale = np.abs(exact - given_thoughts).max()
    assert scale > 0.004
    np.testing.assert_allclose(estimated, exact, atol=1e-3 * scale)


@pytest.mark.slow
def test_thoughts_of_a_place_are_drawn_independently_from_the_model(toy: Thinker, policy: Any) -> None:
    """What enumeration takes for granted. Also thoughts of different places."""
    draws = 4000

    @jax.jit
    def sample(params: Any, batch: Batch, keys: jax.Array) -> Any:
        text = replace(toy, batch=batch).read(params)
        one = lambda key: sample_thoughts(ThinkingDecoder(toy.decoder, THINKING), params, text, batch, PLACES, key, 1.0)  # noqa: E731
        return jax.vmap(one)(keys)

    thoughts = sample(toy.params, toy.batch, jax.random.split(jax.random.key(0), draws))
    tokens = np.asarray(thoughts.tokens_T[:, 0, :, :, 0])
    for (place, m), (other_place, other_m) in itertools.combinations(itertools.product(range(2), repeat=2), 2):
        counts = np.bincount(tokens[:, place, m] * V + tokens[:, other_place, other_m], minlength=V * V)
        expected = draws * np.outer(policy[place], policy[other_place]).ravel()
        degrees = V * V - 1
        assert abs(np.sum((counts - expected) ** 2 / expected) - degrees) < 4.5 * np.sqrt(2 * degrees)
    np.testing.assert_allclose(
        thoughts.log_probs_T[:, 0, 0, 0, 0], np.log(policy[0, tokens[:, 0, 0]]), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(thoughts.entropies_T[0, 0, :, 0, 0], -(policy * np.log(policy)).sum(1), rtol=1e-3)

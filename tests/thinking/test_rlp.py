"""RLP (arXiv 2510.01265) as settings of thinking: its loss written out, with everything that the settings leave out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from thinking_models import Thinker, thinking_params

from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig
from mod_star.flops import scoring_flops
from mod_star.model.routing import Tokens
from mod_star.model.transformer import apply_blocks, head_matrix
from mod_star.thinking.objective import Places, talk_loss
from mod_star.thinking.thought import Thought

V, M = 5, 3
MODEL = ModelConfig(vocab_size=V, width=8, layers=1, heads=1, mlp_width=8, context=6)
RLP = ThinkingConfig(
    thought_length=1, n_true=2, n_thoughts=M, mixing="thought", talk_weight=0.0, policy_weight=1.0,
    baseline="leave_one_out", drop_negative=False,
)  # fmt: skip
RUN = RunConfig(MODEL, RoutingConfig(every=0), thinking=RLP)
PLACE, CLIP = 1, 0.2
THOUGHTS = (0, 3, 4)


def read(thinker: Thinker, params: Any, inputs_NxD: jax.Array) -> jax.Array:
    """Log-probabilities NxV of the plain decoder over inputs."""
    N = inputs_NxD.shape[0]
    tokens = Tokens(inputs_NxD, jnp.arange(N), jnp.ones(N, jnp.int32))
    hidden = apply_blocks(thinker.decoder, params, tokens, keep_keys_values=False).hidden
    return jax.nn.log_softmax(hidden @ head_matrix(params).T)


def test_its_gradient_is_that_of_the_clipped_surrogate_against_an_average_model(
    random_params: Any, make_batch: Any
) -> None:
    params = thinking_params(RUN, random_params(MODEL, RUN.routing))
    params["thinking"]["mixing"] = {}
    average = jax.tree.map(lambda leaf: 0.9 * leaf, params)  # of the parameters so far: any other model will do
    thinker = Thinker(RUN, params, make_batch([[6]], 6, V))
    text = thinker.batch["tokens"][0]
    targets = np.asarray(thinker.batch["targets"][0, PLACE : PLACE + 2])  # of the test's batch; any tokens

    @jax.jit
    def log_probs(params: Any, thought: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the thought, and of each of the two targets after it; by the plain decoder."""
        embed, own = params["embedding"], params["thinking"]
        parts = [embed[text[: PLACE + 1]], own["start"][None], embed[thought][None], own["end"][None]]
        log_p = read(thinker, params, jnp.concatenate([*parts, embed[text[PLACE + 1]][None]]))
        return log_p[PLACE + 1, thought], log_p[[PLACE + 3, PLACE + 4], targets]

    without = np.asarray(read(thinker, average, average["embedding"][text]), np.float64)
    baseline = without[[PLACE, PLACE + 1], targets].sum()
    old, likelihoods = jax.vmap(lambda thought: log_probs(params, thought))(jnp.asarray(THOUGHTS))
    rewards = np.asarray(likelihoods, np.float64).sum(-1) - baseline
    advantages = M / (M - 1) * (rewards - rewards.mean())

    def surrogate(params: Any) -> jax.Array:
        now = jax.vmap(lambda thought: log_probs(params, thought)[0])(jnp.asarray(THOUGHTS))
        ratio = jnp.exp(now - old)
        clipped = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)
        return -jnp.sum(clipped) / (2 * M)  # per prediction: two follow each of M thoughts

    def loss(params: Any) -> tuple[jax.Array, Any]:
        places = Places(jnp.asarray([[PLACE]]), jnp.ones((1, 1), bool))
        tokens = jnp.asarray(THOUGHTS, jnp.int32).reshape(1, 1, M, 1)
        thoughts = Thought(tokens, jnp.zeros(tokens.shape), jnp.zeros(tokens.shape), None)
        return talk_loss(thinker.thinks, params, thinker.read(params), thinker.batch, places, thoughts, 10)

    expected = jax.jit(jax.grad(surrogate))(params)
    gradient, talk = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(talk.advantages_BxJxM[0, 0], advantages, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(-np.sum(talk.nll_BxJxMxN[0, 0], -1) - baseline, rewards, rtol=1e-4, atol=1e-5)
    assert np.all(np.asarray(talk.weights_BxJxMxN) == 1)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert scale > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), gradient, expected)


def test_without_a_head_no_operations_are_counted_for_it() -> None:
    assert scoring_flops(RUN, 6).mixing == 0.0
    assert scoring_flops(replace(RUN, thinking=replace(RLP, mixing="head")), 6).mixing > 0

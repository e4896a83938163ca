"""What thoughts and predictions after them depend on, and what they don't: by changing inputs, and by gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from some_nightly import some_nightly
from thinking_models import Thinker, scores, thinking_params, thinks

from mod_star.config import RoutingConfig, RunConfig, ThinkingConfig
from mod_star.model import Decoder
from mod_star.thinking.objective import Places, Talk, predicted, talk_loss
from mod_star.thinking.sample import ThinkingDecoder
from mod_star.thinking.thought import Thought
from mod_star.training.objectives.next_token import forward

S, J, M, N, T = 24, 22, 2, 3, 3
"""Of `thinker`: tokens, places, thoughts at each, predictions after each, tokens of each."""


def with_token_changed(thinker: Thinker, index: int) -> dict[str, jax.Array]:
    """The batch with another token at `index` of both sequences."""
    tokens = np.array(thinker.batch["tokens"])
    tokens[:, index] = (tokens[:, index] + 5) % 29
    return {**thinker.batch, "tokens": jnp.asarray(tokens)}


def sees(thinker: Thinker, reader: Any, index: int) -> Any:
    """Whether what is computed at `reader` (indices, [B, ...] or broadcast) may depend on the token at `index`."""
    ids = np.asarray(thinker.batch["segment_ids"])
    same = np.stack([row[np.minimum(reader, S - 1)] == row[index] for row in ids])
    return same & (reader >= index) & (ids[:, index] > 0).reshape(-1, *[1] * reader.ndim)


@pytest.mark.slow
def test_thoughts_depend_on_no_later_token_and_no_other_document(
    thinker: Thinker, thought_of: tuple[Places, Thought]
) -> None:
    places, thoughts = thought_of
    np.testing.assert_array_equal(places.indices_BxJ, [np.arange(J)] * 2)
    filled = np.asarray(places.filled_BxJ)
    changes, chances = 0, 0
    for index in range(S):
        _, after = thinks(thinker.run)(thinker.params, with_token_changed(thinker, index), jax.random.key(5))
        may = sees(thinker, np.arange(J), index) & filled
        must_not = filled & ~may
        np.testing.assert_array_equal(after.tokens_T[must_not], thoughts.tokens_T[must_not])
        for name in ("log_probs_T", "entropies_T"):
            np.testing.assert_allclose(getattr(after, name)[must_not], getattr(thoughts, name)[must_not], atol=1e-5)
        if thoughts.decided_GxT is not None:
            np.testing.assert_array_equal(after.decided_GxT[must_not], thoughts.decided_GxT[must_not])
        changed = np.abs(after.entropies_T - thoughts.entropies_T)[may][..., 0] > 1e-5
        changes, chances = changes + changed.sum(), chances + changed.size
    assert changes > 0.9 * chances and chances > 300


@pytest.mark.slow
def test_predictions_after_thoughts_depend_on_the_text_up_to_them_alone(
    thinker: Thinker, thought_of: tuple[Places, Thought], scored: tuple[jax.Array, Talk]
) -> None:
    (places, thoughts), (_, talk) = thought_of, scored
    index_BxJxN, weights = predicted(thinker.batch, places, thinker.run.thinking)
    counts = np.asarray(weights) > 0
    changes, chances = 0, 0
    for index in range(S):
        _, after = scores(thinker.run)(thinker.params, with_token_changed(thinker, index), places, thoughts)
        may = sees(thinker, np.asarray(index_BxJxN[0]), index) & counts
        must_not = np.broadcast_to((counts & ~may)[:, :, None], talk.nll_BxJxMxN.shape)
        for name in ("nll_BxJxMxN", "weights_BxJxMxN"):
            np.testing.assert_allclose(getattr(after, name)[must_not], getattr(talk, name)[must_not], atol=1e-5)
        thought_must_not = np.asarray(places.filled_BxJ) & ~sees(thinker, np.arange(J), index)
        log_probs, log_probs_after = (t.log_probs_BxJxM[thought_must_not] for t in (talk, after))
        np.testing.assert_allclose(log_probs_after, log_probs, atol=1e-5)
        changed = np.any(np.abs(after.nll_BxJxMxN - talk.nll_BxJxMxN) > 1e-5, 2)[may]
        changes, chances = changes + changed.sum(), chances + changed.size
    assert changes > 0.9 * chances and chances > 900


def test_a_thought_changes_what_comes_after_itself_alone(
    thinker: Thinker, thought_of: tuple[Places, Thought], scored: tuple[jax.Array, Talk]
) -> None:
    (places, thoughts), (_, talk) = thought_of, scored
    for where in ((0, 5, 1, 0), (1, 20, 0, T - 1)):
        other = thoughts.tokens_T.copy()
        other[where] = (other[where] + 5) % 29
        _, after = scores(thinker.run)(thinker.params, thinker.batch, places, replace(thoughts, tokens_T=other))
        own = np.zeros((2, J, M), bool)
        own[where[:3]] = True
        for name in ("nll_BxJxMxN", "weights_BxJxMxN", "log_probs_BxJxM"):
            np.testing.assert_array_equal(getattr(after, name)[~own], getattr(talk, name)[~own])
            assert np.all(getattr(after, name)[own] != getattr(talk, name)[own])


@pytest.mark.parametrize("every", some_nightly([0, 2], 0), ids=["dense", "routed"])
@pytest.mark.slow
def test_no_gradient_reaches_a_later_embedding_or_another_document(
    every: int, tiny_run: RunConfig, random_params: Any, make_batch: Any
) -> None:
    """Token i reads row i of the embedding, thoughts read row 20; the head is another matrix."""
    routing = replace(tiny_run.routing, every=every, headroom=4.0) if every else RoutingConfig(every=0)
    thinking = ThinkingConfig(thought_length=2, n_true=2, n_thoughts=2, chunk=11, drop_negative=False)
    run = replace(tiny_run, model=replace(tiny_run.model, layers=2, tie_embeddings=False), routing=routing)
    params = thinking_params(run, random_params(run.model, routing, seed=2))
    batch = make_batch([[7, 4]], 12, 29) | {"tokens": jnp.arange(12)[None]}
    decided = jnp.full((1, 11, 2, 1, 2), -1, jnp.int8) if every else None
    zeros = jnp.zeros((1, 11, 2, 2))
    # Two different thoughts: equal ones would have an advantage of zero.
    tokens = jnp.broadcast_to(jnp.asarray([[20, 21], [22, 20]]), (1, 11, 2, 2))
    thoughts = Thought(tokens, zeros, zeros, decided)

    @jax.jit
    def gradient(embedding: jax.Array, params: Any, batch: Any) -> jax.Array:
        def loss(embedding: jax.Array, only: jax.Array) -> jax.Array:
            decoder, own = Decoder(run.model, routing), {**params, "embedding": embedding}
            text = forward(decoder, own, batch, None, "causal", keep_keys_values=True)
            places = Places(jnp.arange(11)[None], (jnp.arange(11) == only)[None])
            return talk_loss(ThinkingDecoder(decoder, thinking), own, text, batch, places, thoughts, 50)[0]

        return jax.vmap(jax.grad(loss), (None, 0))(embedding, jnp.arange(11))

    reaches = np.any(np.asarray(gradient(params["embedding"], params, batch)) != 0, -1)
    # The last place of a document predicts nothing; the one before it a single token, after which none is read.
    expected: Any = np.zeros((11, 12), bool)
    for start, end in ((0, 7), (7, 11)):
        for place in range(start, end - 1):
            expected[place, start : min(place + 1, end - 2) + 1] = True
    np.testing.assert_array_equal(reaches[:, :12], expected)
    np.testing.assert_array_equal(reaches[:, 20:23], np.broadcast_to(expected.any(1)[:, None], (11, 3)))
    assert not np.any(reaches[:, 23:])

"""No token changes an earlier hidden state under the causal rule, and no gradient flows from one to a later token."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mod_star.config import RunConfig
from mod_star.model import Decoder

Batch = dict[str, jax.Array]
RandomParams = Callable[..., Any]


def changed_by_later_tokens(decoder: Decoder, params: Any, tokens: Any, **options: Any) -> np.ndarray:
    """Bool [j, i]: changing token j changed the hidden state at i."""
    S, V = len(tokens), decoder.config.vocab_size
    tokens = np.asarray(tokens)
    others = np.where(np.eye(S, dtype=bool), (tokens + 1) % V, tokens)
    run: Any = jax.jit(jax.vmap(lambda t: decoder.apply({"params": params}, t, **options)))
    hidden = np.asarray(run(np.concatenate([tokens[None], others])).hidden)
    return np.any(hidden[1:] != hidden[:1], -1)


@pytest.mark.parametrize("rule", ["predictor", "router"])
def test_under_the_causal_rule_no_token_changes_an_earlier_hidden_state(
    rule: Any, tiny_run: RunConfig, tiny_batch: Batch, random_params: RandomParams
) -> None:
    routing = replace(tiny_run.routing, causal_rule=rule, headroom=1.0)
    decoder, params = Decoder(tiny_run.model, routing), random_params(tiny_run.model, routing, seed=2)
    changed = changed_by_later_tokens(decoder, params, tiny_batch["tokens"][0], mode="causal")
    assert not np.any(np.tril(changed, -1))
    assert np.all(np.diag(changed)) and np.mean(changed[np.triu_indices(24, 1)]) > 0.9


def test_under_top_k_later_tokens_do_change_earlier_hidden_states(
    tiny_run: RunConfig, tiny_batch: Batch, random_params: RandomParams
) -> None:
    decoder, params = Decoder(tiny_run.model, tiny_run.routing), random_params(tiny_run.model, tiny_run.routing, seed=2)
    changed = changed_by_later_tokens(decoder, params, tiny_batch["tokens"][0], mode="top_k")
    assert np.any(np.tril(changed, -1)), "they compete for capacity"


@pytest.mark.parametrize("mode", ["top_k", "causal"])
@pytest.mark.slow
def test_no_gradient_flows_from_a_hidden_state_to_a_later_embedding(
    mode: Any, tiny_run: RunConfig, random_params: RandomParams
) -> None:
    """Under top-k neither: what later tokens change is who is selected, and that has no gradient."""
    model = replace(tiny_run.model, tie_embeddings=False)
    decoder, params = Decoder(model, tiny_run.routing), random_params(model, tiny_run.routing, seed=2)
    tokens = jnp.arange(24)  # token i reads row i of the embedding
    direction = jnp.asarray(np.random.default_rng(0).normal(size=model.width), jnp.float32)

    def hidden(embedding: jax.Array) -> jax.Array:
        output: Any = decoder.apply({"params": {**params, "embedding": embedding}}, tokens, mode=mode)
        return output.hidden @ direction

    jacobian = jax.jit(jax.jacrev(hidden))(params["embedding"])[:, :24]
    reaches = np.any(np.asarray(jacobian) != 0, -1)
    assert not np.any(np.triu(reaches, 1))
    assert np.all(np.tril(reaches) == np.tri(24, dtype=bool))


@pytest.mark.slow
def test_it_is_causal_unless_told_otherwise_with_the_slots_of_generation_whatever_the_texts_length(
    tiny_run: RunConfig, tiny_batch: Batch, random_params: RandomParams
) -> None:
    """A library user's perplexity must not see the future, not even how long the text is."""
    routing = replace(tiny_run.routing, capacity=1 / 12, headroom=1.0)  # two slots; of 12 tokens it would be one
    decoder, params = Decoder(tiny_run.model, routing), random_params(tiny_run.model, routing, seed=2)
    tokens = tiny_batch["tokens"][0]
    changed = changed_by_later_tokens(decoder, params, tokens)
    assert not np.any(np.tril(changed, -1))
    whole, half = jax.jit(lambda p: [decoder.apply({"params": p}, tokens[:n]) for n in (24, 12)])(params)
    np.testing.assert_array_equal(half.trace.selected, whole.trace.selected[:, :12])  # type: ignore[union-attr]
    np.testing.assert_allclose(half.hidden, whole.hidden[:12], rtol=2e-5, atol=2e-5)  # type: ignore[union-attr]
    assert np.all(np.sum(whole.trace.selected, -1) == 2)  # type: ignore[union-attr]
    assert np.any(np.sum(half.trace.selected, -1) == 2)  # type: ignore[union-attr]

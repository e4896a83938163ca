"""A thought, and what it reads at each of its steps.

That is the embedding of the token it has drawn, or `<start>` again; in a latent thought it is the last hidden state, or
the mean embedding of the tokens that it predicts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.config import ThinkingConfig
from mod_star.errors import InputError
from mod_star.model.layers import lookup
from mod_star.model.linear import linear
from mod_star.model.parts import LatentInput, Parts, ThoughtInput, require_array
from mod_star.model.transformer import logits_of

DRAW_BLOCK = 128


@struct.dataclass
class Thought:
    """One thought of t tokens."""

    tokens_T: jax.Array
    """int32; -1 for a pause, and in a latent thought."""
    log_probs_T: jax.Array
    """float32 log-probability of each token under the model (temperature 1), in nats; 0 where the token is -1."""
    entropies_T: jax.Array
    """float32 entropy of the distribution that each token was drawn from (temperature 1), in nats; 0 in a latent
    thought."""
    decided_GxT: jax.Array | None
    """int8: whether routed block g computed <start> and the first t - 1 tokens; None for a dense model, and for a
    latent thought."""
    extra_T: Any = None
    """What `ThoughtInput.draw` gives to `embed` besides the tokens, a pytree [T, ...]; None for the built-in ones."""


def draw_token(key: jax.Array, logits_V: jax.Array, temperature: float) -> jax.Array:
    """A token drawn from softmax(logits / temperature), int32; the most probable one if the temperature is 0.

    By inverting the cumulative distribution with one uniform number, where `jax.random.categorical` needs one for every
    token of the vocabulary. In two levels, so that only one block of the vocabulary is summed up one by one.
    """
    if temperature == 0:
        return jnp.argmax(logits_V).astype(jnp.int32)
    V = logits_V.shape[0]
    scaled = (logits_V - jnp.max(logits_V)) / temperature
    blocks = jnp.pad(jnp.exp(scaled), (0, -V % DRAW_BLOCK)).reshape(-1, DRAW_BLOCK)
    sums = jnp.sum(blocks, -1)
    ends = jnp.cumsum(sums)
    target = jax.random.uniform(key, (), jnp.float32) * ends[-1]
    block = _first((ends > target) & (sums > 0), sums)
    inside, before = jax.lax.platform_dependent(blocks, ends, block, cpu=_inside_gathered, default=_inside)
    token = _first((before + jnp.cumsum(inside) > target) & (inside > 0), inside)
    return block * DRAW_BLOCK + token


def _inside(blocks: jax.Array, ends: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weights in a block, and the sum of those before it.

    By sums of which one term is not zero: on an accelerator a gather takes several steps, each as long as a sum.
    """
    numbers = jnp.arange(ends.shape[0], dtype=jnp.int32)
    inside = jnp.sum(jnp.where(numbers[:, None] == block, blocks, 0.0), 0)
    return inside, jnp.sum(jnp.where(numbers == block - 1, ends, 0.0))


def _inside_gathered(blocks: jax.Array, ends: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same on a CPU, where those sums take as long as all the rest."""
    return blocks[block], jnp.where(block > 0, ends[block - 1], 0.0)


def _first(candidates: jax.Array, weights: jax.Array) -> jax.Array:
    """Index of the first candidate, int32; should rounding leave none, of the largest weight."""
    count = candidates.shape[0]
    first = jnp.min(jnp.where(candidates, jnp.arange(count, dtype=jnp.int32), count))
    return jnp.where(first < count, first, jnp.argmax(weights).astype(jnp.int32))


def embed_thought(params: dict[str, Any], tokens_N: jax.Array, extra: None = None) -> jax.Array:
    """Float32 embeddings NxD of thought tokens; a pause (-1) is <start> once more."""
    del extra
    return jnp.where(tokens_N[:, None] < 0, params["thinking"]["start"], lookup(params["embedding"], tokens_N))


def _draw(
    params: dict[str, Any], hidden_D: jax.Array, logits_V: jax.Array, key: jax.Array, temperature: float
) -> tuple[jax.Array, None]:
    del params, hidden_D
    return draw_token(key, logits_V, temperature), None


def _pause(
    params: dict[str, Any], hidden_D: jax.Array, logits_V: jax.Array, key: jax.Array, temperature: float
) -> tuple[jax.Array, None]:
    del params, hidden_D, logits_V, key, temperature
    return jnp.int32(-1), None


def last_hidden(params: dict[str, Any], hidden_D: jax.Array) -> jax.Array:
    """The hidden state itself, float32 (PonderLM-2, arXiv 2509.23184)."""
    del params
    return hidden_D.astype(jnp.float32)


def expected_embedding(params: dict[str, Any], hidden_D: jax.Array) -> jax.Array:
    """Sum of p(v)·embedding(v) over the vocabulary, float32 (PonderLM, arXiv 2505.20674).

    p is the prediction at temperature 1, float32. It is rounded to the hidden state's type for the product.
    """
    p_1xV = jax.nn.softmax(logits_of(params, hidden_D[None]))
    embedding_VxD = params["embedding"].astype(hidden_D.dtype)
    return linear(p_1xV.astype(hidden_D.dtype), embedding_VxD, jnp.float32, precision="highest")[0]


THOUGHT_INPUTS: dict[str, ThoughtInput | LatentInput] = {
    "sampled": ThoughtInput(_draw, embed_thought),
    "pause": ThoughtInput(_pause, embed_thought),
    "latent": LatentInput(last_hidden),
    "expected": LatentInput(expected_embedding),
}
"""By `thinking.kind`."""


def thought_input(parts: Parts, thinking: ThinkingConfig) -> ThoughtInput | LatentInput:
    """What a thought reads at its steps, as is in force."""
    return parts.thought or THOUGHT_INPUTS[thinking.kind]


def latent_input(parts: Parts, thinking: ThinkingConfig) -> LatentInput | None:
    """The same of a latent thought; None: thoughts draw."""
    used = thought_input(parts, thinking)
    return used if isinstance(used, LatentInput) else None


def feed_back(latent: LatentInput, params: dict[str, Any], hidden_D: jax.Array) -> jax.Array:
    """What a latent thought reads next, float32 D.

    Raises:
      InputError: a user's function gives another shape or type.
    """
    return require_array("thought.feed_back", latent.feed_back(params, hidden_D), hidden_D.shape)


def latent_thought(length: int) -> Thought:
    """A latent thought of `length` steps, as it is known before it is scored: no tokens."""
    zeros_T = jnp.zeros(length, jnp.float32)
    return Thought(jnp.full(length, -1, jnp.int32), zeros_T, zeros_T, None)


def draw_step(
    used: ThoughtInput, params: dict[str, Any], step: tuple[jax.Array, ...], temperature: float
) -> tuple[jax.Array, Any]:
    """The token that a step draws, int32, and what else `embed` needs of the step.

    Args:
      used: from `thought_input`.
      params: the model's.
      step: hidden state D, logits V and key.
      temperature: of the draw; 0: greedy.

    Raises:
      InputError: a user's function gives something else.
    """
    result = used.draw(params, *step, temperature)
    if not isinstance(result, tuple) or len(result) != 2:
        raise InputError(f"parts.thought.draw = {type(result).__name__}: must be a pair (token, extra)")
    return require_array("thought.draw token", result[0], (), jnp.int32), result[1]


def embed_tokens(used: ThoughtInput, params: dict[str, Any], tokens_N: jax.Array, extra_N: Any) -> jax.Array:
    """Input embeddings of thought tokens, float32 NxD, by what `thought_input` gives.

    Raises:
      InputError: a user's function gives another shape or type.
    """
    x_NxD = used.embed(params, tokens_N, extra_N)
    return require_array("thought.embed", x_NxD, (tokens_N.shape[0], params["embedding"].shape[-1]))


def log_prob_of(log_p_V: jax.Array, token: jax.Array) -> jax.Array:
    """Log-probability of a token, float32; 0 where none is drawn (-1)."""
    return jnp.where(token < 0, 0.0, log_p_V[jnp.maximum(token, 0)])

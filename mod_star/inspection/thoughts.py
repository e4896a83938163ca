"""A text with a thought before every token, and how each thought changed the prediction."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mod_star.config import ThinkingConfig
from mod_star.decoding.think import Think
from mod_star.errors import InputError, require
from mod_star.inspection.routes import token_pieces
from mod_star.model import Decoder
from mod_star.model.routing import causal_slots
from mod_star.model.transformer import logits_of
from mod_star.runs.directory import LoadedRun
from mod_star.thinking.mixing import mixed_logits, thought_weight
from mod_star.thinking.objective import memory_of
from mod_star.thinking.sample import Place, ThinkingDecoder, sample_thought
from mod_star.tokenization.tokenizers import begin
from mod_star.views.thoughts import TextThoughts

POSITIONS_AT_ONCE = 32
"""Texts are padded to a multiple of this, so that few programs are compiled for texts of many lengths."""


def thoughts_of(run: LoadedRun, text: str, temperature: float = 0.0, seed: int = 0) -> TextThoughts:
    """Thinks after every token of a text, as one document, and says what that did to the prediction of the next.

    The thoughts are those that the model would think if it had generated the text (`Think("always")`).

    Args:
      run: a model that has learned to think.
      text: not longer than the context, bos included.
      temperature: of the thoughts' draws; 0: greedy.
      seed: of these draws.

    Raises:
      InputError: the model can't think, the text is too long, or the temperature is wrong.
    """
    context, thinking = run.config.model.context, run.config.thinking
    objective = run.config.train.objective
    require(
        "thinking" in run.params, "train.objective", objective, "must be quiet_star: the model has not learned to think"
    )
    Think("always", temperature=temperature)  # checks it
    ids = begin(run.tokenizer, text)
    if len(ids) > context:
        raise InputError(f"text = {len(ids)} tokens, bos included: must be at most model.context = {context}")
    padded = np.zeros(-(-len(ids) // POSITIONS_AT_ONCE) * POSITIONS_AT_ONCE, np.int32)
    padded[: len(ids)] = ids
    length, key = jnp.int32(len(ids)), jax.random.key(seed)
    arrays = _think_everywhere(run.decoder, run.params, thinking, temperature, padded, length, key)
    base, talk, weights, entropies, thoughts_SxT = (np.asarray(array) for array in arrays)
    # What follows position i is token i + 1; nothing stands before the first.
    shifted = lambda values: [None, *values[: len(ids) - 1].astype(float).tolist()]  # noqa: E731
    thoughts = [[], *([i for i in row.tolist() if i >= 0] for row in thoughts_SxT[: len(ids) - 1])]
    return TextThoughts(
        tokens=token_pieces(run.tokenizer, ids),
        base_log_probs=shifted(base),
        talk_log_probs=shifted(talk),
        thoughts=[run.tokenizer.decode(thought) for thought in thoughts],
        thought_tokens=[token_pieces(run.tokenizer, thought) for thought in thoughts],
        weights=shifted(weights),
        entropies=shifted(entropies),
    )


@functools.partial(jax.jit, static_argnames=("decoder", "thinking", "temperature"))
def _think_everywhere(
    decoder: Decoder,
    params: dict[str, Any],
    thinking: ThinkingConfig,
    temperature: float,
    tokens_S: jax.Array,
    length: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, ...]:
    """For each position: log-prob of the next token without and with a thought, weight, entropy; thoughts SxT."""
    S = tokens_S.shape[0]
    segment_ids_S = (jnp.arange(S, dtype=jnp.int32) < length).astype(jnp.int32)
    slots = causal_slots(decoder.routing, decoder.config.context)
    output: Any = decoder.apply(
        {"params": params}, tokens_S, None, segment_ids_S, mode="causal", slots=slots, keep_keys_values=True
    )
    text = memory_of(output)

    def one(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        position, following, hidden_D = inputs
        own_key = jax.random.fold_in(key, position)
        thinker, place = ThinkingDecoder(decoder, thinking), Place(position, jnp.int32(1))
        thought, after_D = sample_thought(thinker, params, text, place, own_key, temperature, finish=True)
        assert after_D is not None
        weight_1 = thought_weight(decoder.parts, thinking, params, hidden_D[None], after_D[None])
        base_V = jax.nn.log_softmax(logits_of(params, hidden_D[None])[0])
        talk_V = jax.nn.log_softmax(mixed_logits(params, hidden_D[None], after_D[None], weight_1)[0])
        entropy = -jnp.sum(jnp.exp(base_V) * base_V)
        return base_V[following], talk_V[following], weight_1[0], entropy, thought.tokens_T

    positions_S = jnp.arange(S, dtype=jnp.int32)
    following_S = jnp.roll(tokens_S, -1)
    # In portions: the logits of all positions of a long text may not fit.
    return jax.lax.map(one, (positions_S, following_S, output.hidden), batch_size=POSITIONS_AT_ONCE)

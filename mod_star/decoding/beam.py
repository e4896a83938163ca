"""Beam search: the most probable texts, as far as a beam of a few candidates finds them.

The beams of a prompt are branches that share its keys/values; what is generated moves with `reorder`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mod_star.config import ThinkingConfig
from mod_star.data.tokenizers import Tokenizer
from mod_star.decoding.generate import NEVER, Generator
from mod_star.decoding.generated import Generated
from mod_star.decoding.programs import think_in
from mod_star.decoding.sampling import log_prob_and_gap
from mod_star.decoding.state import DecodeState, reorder
from mod_star.decoding.step import decode_step
from mod_star.decoding.text import Completion, completion_of, encode_prompts
from mod_star.decoding.think import Think
from mod_star.errors import require
from mod_star.model import Decoder
from mod_star.model.transformer import logits_of
from mod_star.sharding import use_mesh


@dataclass(frozen=True)
class Hypothesis:
    """One text that beam search found."""

    tokens: list[int]
    """New tokens, the end token included if it has one."""
    log_probs: list[float]
    """Their log-probabilities in nats."""
    gaps: list[float]
    """p(best token) - p(second best) at each, as in `Generated`."""
    finished: bool
    """Whether it ended by itself; otherwise the limit of new tokens cut it."""
    score: float
    """What it is ranked by: sum of `log_probs` over their number to the power of the length penalty."""

    def generated(self) -> Generated:
        """The same in the form of all other decodings; what routed blocks computed is not kept."""
        count = len(self.tokens) - self.finished
        return Generated(
            tokens=self.tokens[:count],
            log_probs=self.log_probs[:count],
            finished=self.finished,
            routed_fraction=[],
            overflow=0,
            gaps=self.gaps[:count],
            end_log_prob=self.log_probs[-1] if self.finished else None,
            end_gap=self.gaps[-1] if self.finished else None,
        )


@struct.dataclass
class _Search:
    """W beams for each of Q prompts, and the W best texts of each that have ended."""

    state: DecodeState
    live_QxW: jax.Array
    """float32 log-probabilities of the beams; -inf for beams that there aren't (yet)."""
    tokens_QxWxT: jax.Array
    """int32 of the ended texts, the end token included; -1 behind it."""
    log_probs_QxWxT: jax.Array
    """float32, of these tokens."""
    gaps_QxWxT: jax.Array
    """float32, of these tokens."""
    scores_QxW: jax.Array
    """Of the ended texts, falling; -inf where there is none."""


class BeamSearch:
    """Beam search with one model. Compiles once per (number of prompts, prompt length, room), all rounded up as for the
    generator, and for all generators of equal networks.

    In each step every beam may end, which makes it a candidate for the W best ended texts, and the W most probable
    continuations that don't end go on. Ended texts and those that the limit cut are ranked together. The search is over
    as soon as no beam can overtake the W-th best ended text of its prompt.

    Args:
      generator: the model.
      beams: W, per prompt.
      length_penalty: texts are ranked by log-probability over length to this power, the end token counted; 0: by
        log-probability, 1: by its mean per token.
      think: when to think; probabilities are then the mixed ones.

    Raises:
      InputError: no beam or more than the vocabulary has tokens, or a negative or infinite length penalty.
    """

    def __init__(self, generator: Generator, beams: int = 4, length_penalty: float = 0.0, think: Think = NEVER) -> None:
        check_beams(beams, length_penalty)
        V = generator.decoder.config.vocab_size
        require(beams <= V, "beams", beams, f"must be at most the vocabulary, {V}")
        generator._check_thinking(think)
        self._generator, self._width = generator, beams
        self._threshold = think.threshold or 0.0
        ends = tuple(end for end in generator._end_ids if 0 <= end < V)
        self._rules = _Rules(generator.decoder, generator.thinking, replace(think, threshold=0.0), ends, length_penalty)

    def search(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[Hypothesis]]:
        """The best texts of each prompt, best first: W of them, or fewer if there aren't more.

        Raises:
          InputError: as for `Generator.start`.
        """
        W = self._width
        state = self._generator.start(prompts, new_tokens, branches=W)
        with use_mesh(self._generator._mesh):
            generator = self._generator
            search = _run(self._rules, W, generator.params, state, np.float32(self._threshold), generator._routing_key)
        return self._rules.hypotheses(search, new_tokens)


@dataclass(frozen=True)
class _Rules:
    """What a search is compiled for."""

    decoder: Decoder
    thinking: ThinkingConfig
    think: Think
    """Its threshold is data."""
    ends: tuple[int, ...]
    length_penalty: float

    def begin(self, state: DecodeState, W: int) -> _Search:
        """The search before the first token."""
        B, T = state.tokens_BxT.shape
        Q = B // W
        # All beams are the same before the first token: one of them stands for all. There is none of prompts that only
        # fill up the batch.
        is_live = (jnp.arange(W) == 0) & (jnp.arange(Q) < state.count)[:, None]
        tokens = jnp.full((Q, W, T), -1, jnp.int32)
        scores = jnp.full((Q, W), -jnp.inf, jnp.float32)
        log_probs, gaps = (jnp.zeros((Q, W, T), jnp.float32) for _ in range(2))
        return _Search(state, jnp.where(is_live, 0.0, -jnp.inf), tokens, log_probs, gaps, scores)

    def is_unfinished(self, search: _Search) -> jax.Array:
        """Whether there may be a better text."""
        # Log-probabilities only fall, so the most that a beam can come to is what it has over the greatest length.
        limit = search.state.limit
        reachable_Q = jnp.max(search.live_QxW, -1) / limit.astype(jnp.float32) ** self.length_penalty
        return (search.state.step < limit) & jnp.any(search.scores_QxW[:, -1] < reachable_Q)

    def one_token(
        self, params: dict[str, Any], threshold: jax.Array, routing_key: jax.Array | None, search: _Search
    ) -> _Search:
        """The search after one more token."""
        state = search.state
        Q, W = search.live_QxW.shape
        record = None
        if self.think.when == "never":
            logits_BxV = logits_of(params, state.hidden_BxD)
        else:
            logits_BxV, record = think_in(self.decoder, self.thinking, params, state, self.think, threshold)
        log_p_QxWxV = jax.nn.log_softmax(logits_BxV.astype(jnp.float32)).reshape(Q, W, -1)
        V = log_p_QxWxV.shape[-1]
        _, gaps_B = log_prob_and_gap(logits_BxV, jnp.zeros(Q * W, jnp.int32))
        search = self._end(search, log_p_QxWxV, gaps_B)

        ends = jnp.isin(jnp.arange(V), jnp.array(self.ends, jnp.int32))
        total_QxWxV = jnp.where(ends, -jnp.inf, search.live_QxW[:, :, None] + log_p_QxWxV)
        live_QxW, chosen_QxW = jax.lax.top_k(total_QxWxV.reshape(Q, -1), W)
        rows_B = (jnp.arange(Q)[:, None] * W + chosen_QxW // V).reshape(-1)
        tokens_B = (chosen_QxW % V).reshape(-1).astype(jnp.int32)
        log_probs_B = log_p_QxWxV.reshape(Q * W, V)[rows_B, tokens_B]

        def write(buffer: jax.Array, values: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, values[:, None], state.step, 1)

        if record is not None:
            state = replace(state, record=jax.tree.map(write, state.record, record))
        state = replace(state, gaps_BxT=write(state.gaps_BxT, gaps_B))
        state = reorder(state, rows_B)
        hidden_BxD, caches = decode_step(
            self.decoder, params, state.caches, tokens_B, state.lengths_B, state.step,
            (live_QxW > -jnp.inf).reshape(-1), state.branches, routing_key,
        )  # fmt: skip
        state = replace(
            state,
            caches=caches,
            hidden_BxD=hidden_BxD,
            tokens_BxT=write(state.tokens_BxT, tokens_B),
            log_probs_BxT=write(state.log_probs_BxT, log_probs_B),
            step=state.step + 1,
        )
        return replace(search, state=state, live_QxW=live_QxW)

    def _end(self, search: _Search, log_p_QxWxV: jax.Array, gaps_B: jax.Array) -> _Search:
        """Every beam as it would be if it ended here, among the ended texts if it is good enough."""
        state = search.state
        Q, W = search.live_QxW.shape
        T = state.tokens_BxT.shape[1]
        here = jnp.arange(T) == state.step
        length = (state.step + 1).astype(jnp.float32)

        def with_end(buffer_BxT: jax.Array, values: jax.Array) -> jax.Array:
            return jnp.where(here, values.reshape(Q, W, 1), buffer_BxT.reshape(Q, W, T))

        kept = [(search.scores_QxW, search.tokens_QxWxT, search.log_probs_QxWxT, search.gaps_QxWxT)]
        for end in self.ends:
            log_p_QxW = log_p_QxWxV[:, :, end]
            kept.append(
                (
                    (search.live_QxW + log_p_QxW) / length**self.length_penalty,
                    with_end(state.tokens_BxT, jnp.full((Q, W), end, jnp.int32)),
                    with_end(state.log_probs_BxT, log_p_QxW),
                    with_end(state.gaps_BxT, gaps_B),
                )
            )
        scores, *values = (jnp.concatenate(parts, 1) for parts in zip(*kept, strict=True))
        best_QxW, order_QxW = jax.lax.top_k(scores, W)
        tokens, log_probs, gaps = (jnp.take_along_axis(each, order_QxW[:, :, None], 1) for each in values)
        return replace(
            search, tokens_QxWxT=tokens, log_probs_QxWxT=log_probs, gaps_QxWxT=gaps, scores_QxW=best_QxW
        )  # fmt: skip

    def hypotheses(self, search: _Search, new_tokens: int) -> list[list[Hypothesis]]:
        """What was found for each prompt that counts."""
        state = jax.device_get(search.state)
        ended = jax.device_get((search.tokens_QxWxT, search.log_probs_QxWxT, search.gaps_QxWxT, search.scores_QxW))
        live_QxW = jax.device_get(search.live_QxW)
        W = live_QxW.shape[1]
        results = []
        for q in range(int(state.count)):
            found = []
            for w in range(W):
                tokens, log_probs, gaps, score = (array[q, w] for array in ended)
                count = int((tokens >= 0).sum())
                if score > -math.inf:
                    made = (tokens[:count].tolist(), log_probs[:count].tolist(), gaps[:count].tolist())
                    found.append(Hypothesis(*made, True, float(score)))
                if state.step == new_tokens and live_QxW[q, w] > -math.inf:
                    row, score = q * W + w, float(live_QxW[q, w]) / new_tokens**self.length_penalty
                    buffers = (state.tokens_BxT, state.log_probs_BxT, state.gaps_BxT)
                    rows = [buffer_BxT[row, :new_tokens] for buffer_BxT in buffers]
                    made = (rows[0].tolist(), rows[1].tolist(), rows[2].tolist())
                    found.append(Hypothesis(*made, False, score))
            results.append(sorted(found, key=lambda each: -each.score)[:W])
        return results


@functools.partial(jax.jit, static_argnames=("rules", "width"), donate_argnames="state")
def _run(
    rules: _Rules, width: int, params: dict[str, Any], state: DecodeState, threshold: jax.Array,
    routing_key: jax.Array | None,
) -> _Search:  # fmt: skip
    one_token = functools.partial(rules.one_token, params, threshold, routing_key)
    return jax.lax.while_loop(rules.is_unfinished, one_token, rules.begin(state, width))


def check_beams(beams: int, length_penalty: float) -> None:
    """Raises InputError for a beam search that can't be."""
    require(beams >= 1, "beams", beams, "must be at least 1")
    possible = length_penalty >= 0 and math.isfinite(length_penalty)
    require(possible, "length_penalty", length_penalty, "must be at least 0 and finite")


def beam_search(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    new_tokens: int,
    *,
    beams: int = 4,
    length_penalty: float = 0.0,
    stop: Sequence[str] = (),
    think: Think = NEVER,
    encoded: Sequence[Sequence[int]] | None = None,
) -> list[list[Completion]]:
    """Beam search from text to text, all prompts in one batch; see `BeamSearch`.

    Args:
      generator: the model; its end ids should be the tokenizer's.
      tokenizer: the model's.
      prompts: the texts to go on from.
      new_tokens: the most tokens to generate for each.
      beams: per prompt.
      length_penalty: see `BeamSearch`.
      stop: strings that cut the texts that were found; the search itself knows nothing of them.
      think: when to think.
      encoded: the prompts' token ids, if they are not what `encode_prompts` makes of them.

    Returns:
      For each prompt the best texts, best first, without what routed blocks and thoughts were.
    """
    require(all(stop), "stop", tuple(stop), "must not be an empty string")
    ids = encode_prompts(tokenizer, prompts) if encoded is None else encoded
    found = BeamSearch(generator, beams, length_penalty, think).search(ids, new_tokens)
    return [
        [completion_of(tokenizer, prompt, each.generated(), new_tokens, stop) for each in hypotheses]
        for prompt, hypotheses in zip(prompts, found, strict=True)
    ]

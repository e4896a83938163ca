"""Beam search: the most probable texts, as far as a beam of a few candidates finds them.

The beams of a prompt are branches that share its keys/values; what is generated moves with `reorder`. Without stop
strings the whole search is one program; with them the host looks at the text after every token.
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
from mod_star.decoding.generate import NEVER, Generator
from mod_star.decoding.generated import Generated
from mod_star.decoding.programs import think_in
from mod_star.decoding.sampling import log_prob_and_gap
from mod_star.decoding.state import DecodeState, reorder
from mod_star.decoding.step import decode_step
from mod_star.decoding.text import Completion, StopWatch, completion_of, encode_prompts
from mod_star.decoding.think import Think
from mod_star.distributed.sharding import use_mesh
from mod_star.errors import require
from mod_star.model import Decoder
from mod_star.model.transformer import logits_of
from mod_star.tokenization.tokenizers import Tokenizer

LENGTH_PENALTY = 1.0
"""The default of transformers, vLLM and fairseq: texts are ranked by the mean log-probability of their tokens."""


@dataclass(frozen=True)
class Hypothesis:
    """One text that beam search found."""

    tokens: list[int]
    """New tokens, the end token included if it has one, up to the one that completes a stop string."""
    log_probs: list[float]
    """Their log-probabilities in nats."""
    gaps: list[float]
    """p(best token) - p(second best) at each, as in `Generated`."""
    finished: bool
    """Whether it ended by itself; otherwise a stop string or the limit of new tokens cut it."""
    score: float
    """What it is ranked by: sum of `log_probs` over their number to the power of the length penalty."""
    stopped: bool = False
    """Whether a stop string ended it."""

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


@struct.dataclass
class _Candidates:
    """The K most probable continuations of a prompt's beams that don't end, the best first."""

    totals_QxK: jax.Array
    """float32 log-probabilities of the texts; -inf where there is none."""
    beams_QxK: jax.Array
    """int32, which beam each goes on from."""
    tokens_QxK: jax.Array
    """int32, with which token."""
    log_probs_QxK: jax.Array
    """float32, of the token."""
    gaps_QxW: jax.Array
    """float32 gap of each beam at this step."""


class BeamSearch:
    """Beam search with one model. Compiles once per (number of prompts, prompt length, room), all rounded up as for the
    generator, and for all generators of equal networks.

    In each step every beam may end, which makes it a candidate for the W best ended texts, and the W most probable
    continuations that don't end go on. A continuation that completes a stop string ends there, too: of the 2W most
    probable ones those that do are ended texts, the best W of the others go on. Ended texts and those that the limit
    cut are ranked together. The search is over as soon as no beam can overtake the W-th best ended text of its prompt.

    Args:
      generator: the model.
      beams: W, per prompt.
      length_penalty: texts are ranked by log-probability over length to this power, the end token and the tokens of a
        stop string counted; 0: by log-probability, 1: by its mean per token.
      think: when to think; probabilities are then the mixed ones.

    Raises:
      InputError: no beam or more than the vocabulary has tokens, or a negative or infinite length penalty.
    """

    def __init__(
        self, generator: Generator, beams: int = 4, length_penalty: float = LENGTH_PENALTY, think: Think = NEVER
    ) -> None:
        check_beams(beams, length_penalty)
        V = generator.decoder.config.vocab_size
        require(beams <= V, "beams", beams, f"must be at most the vocabulary, {V}")
        generator._check_thinking(think)
        self._generator, self._width = generator, beams
        self._data = np.float32(think.threshold or 0.0), generator._routing_key
        ends = tuple(end for end in generator._end_ids if 0 <= end < V)
        self._rules = _Rules(generator.decoder, generator.thinking, replace(think, threshold=0.0), ends, length_penalty)

    def search(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, watches: Sequence[StopWatch] = ()
    ) -> list[list[Hypothesis]]:
        """The best texts of each prompt, best first: W of them, or fewer if there aren't more.

        Args:
          prompts: token ids.
          new_tokens: the most tokens of a text.
          watches: one for each prompt, to end texts at stop strings; none: there are no stop strings.

        Raises:
          InputError: as for `Generator.start`.
        """
        W = self._width
        state = self._generator.start(prompts, new_tokens, branches=W)
        with use_mesh(self._generator._mesh):
            if watches:
                search = self._run_watched(state, watches)
            else:
                search = _run(self._rules, W, self._generator.params, state, *self._data)
        return self._rules.hypotheses(search, new_tokens)

    def _run_watched(self, state: DecodeState, watches: Sequence[StopWatch]) -> _Search:
        """The search token by token, so that the host can tell which texts have come to a stop string."""
        W, params, rules = self._width, self._generator.params, self._rules
        threshold, routing_key = self._data
        count = min(2 * W, W * rules.decoder.config.vocab_size)
        watched = [[watch] * W for watch in watches]
        search = _begin(rules, W, state)
        while bool(_is_unfinished(rules, search)):
            search, candidates = _propose(rules, count, params, search, threshold)
            totals, beams, tokens = jax.device_get(
                (candidates.totals_QxK, candidates.beams_QxK, candidates.tokens_QxK)
            )  # fmt: skip
            stopped_QxK = np.zeros(totals.shape, bool)
            picks_QxW = np.full((totals.shape[0], W), -1, np.int32)  # none of prompts that only fill up the batch
            for q, of_prompt in enumerate(watched):
                going_on: list[StopWatch] = []
                for k in np.flatnonzero(totals[q] > -math.inf):
                    after = of_prompt[beams[q, k]].after(int(tokens[q, k]))
                    stopped_QxK[q, k] = after.stopped
                    if not after.stopped and len(going_on) < W:
                        picks_QxW[q, len(going_on)] = k
                        going_on.append(after)
                watched[q] = going_on + of_prompt[:1] * (W - len(going_on))
            if stopped_QxK.any():
                search = _end_stopped(rules, search, candidates, jnp.asarray(stopped_QxK))
            search = _go_on(rules, params, search, candidates, jnp.asarray(picks_QxW), routing_key)
        return search


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
        is_first, counts = jnp.arange(W, dtype=jnp.int32) == 0, jnp.arange(Q, dtype=jnp.int32) < state.count
        live_QxW = jnp.where(is_first & counts[:, None], jnp.float32(0), jnp.float32(-jnp.inf))
        tokens = jnp.full((Q, W, T), -1, jnp.int32)
        scores = jnp.full((Q, W), -jnp.inf, jnp.float32)
        log_probs, gaps = (jnp.zeros((Q, W, T), jnp.float32) for _ in range(2))
        return _Search(state, live_QxW, tokens, log_probs, gaps, scores)

    def is_unfinished(self, search: _Search) -> jax.Array:
        """Whether there may be a better text."""
        # Log-probabilities only fall, so the most that a beam can come to is what it has over the greatest length.
        limit = search.state.limit
        reachable_Q = jnp.max(search.live_QxW, -1) / limit.astype(jnp.float32) ** self.length_penalty
        return (search.state.step < limit) & jnp.any(search.scores_QxW[:, -1] < reachable_Q)

    def propose(
        self, params: dict[str, Any], search: _Search, count: int, threshold: jax.Array
    ) -> tuple[_Search, _Candidates]:
        """Thinks if it is to, ends every beam where it is, and finds the `count` best ways to go on."""
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

        def write(buffer: jax.Array, values: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, values[:, None], state.step, 1)

        if record is not None:
            search = replace(search, state=replace(state, record=jax.tree.map(write, state.record, record)))
        ends = jnp.isin(jnp.arange(V, dtype=jnp.int32), jnp.array(self.ends, jnp.int32))
        total_QxWxV = jnp.where(ends, -jnp.inf, search.live_QxW[:, :, None] + log_p_QxWxV)
        totals_QxK, chosen_QxK = jax.lax.top_k(total_QxWxV.reshape(Q, -1), count)
        beams_QxK, tokens_QxK = chosen_QxK // V, chosen_QxK % V
        log_probs_QxK = jnp.take_along_axis(log_p_QxWxV.reshape(Q, -1), chosen_QxK, 1)
        return search, _Candidates(totals_QxK, beams_QxK, tokens_QxK, log_probs_QxK, gaps_B.reshape(Q, W))

    def go_on(
        self, params: dict[str, Any], search: _Search, candidates: _Candidates, picks_QxW: jax.Array | None,
        routing_key: jax.Array | None,
    ) -> _Search:  # fmt: skip
        """The candidates picked become the beams; -1: none, None: they are the W candidates."""
        state = search.state
        Q, W = search.live_QxW.shape
        live_QxW, beams_QxW, tokens_QxW, log_probs_QxW = (
            values if picks_QxW is None else jnp.take_along_axis(values, jnp.maximum(picks_QxW, 0), 1)
            for values in (
                candidates.totals_QxK, candidates.beams_QxK, candidates.tokens_QxK, candidates.log_probs_QxK,
            )
        )  # fmt: skip
        if picks_QxW is not None:
            live_QxW = jnp.where(picks_QxW < 0, -jnp.inf, live_QxW)
        rows_B = (jnp.arange(Q, dtype=jnp.int32)[:, None] * W + beams_QxW).reshape(-1)
        tokens_B = tokens_QxW.reshape(-1).astype(jnp.int32)

        def write(buffer: jax.Array, values: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, values[:, None], state.step, 1)

        state = replace(state, gaps_BxT=write(state.gaps_BxT, candidates.gaps_QxW.reshape(-1)))
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
            log_probs_BxT=write(state.log_probs_BxT, log_probs_QxW.reshape(-1)),
            step=state.step + 1,
        )
        return replace(search, state=state, live_QxW=live_QxW)

    def _end(self, search: _Search, log_p_QxWxV: jax.Array, gaps_B: jax.Array) -> _Search:
        """Every beam as it would be if it ended here, among the ended texts if it is good enough."""
        state = search.state
        Q, W = search.live_QxW.shape
        T = state.tokens_BxT.shape[1]
        here = jnp.arange(T, dtype=jnp.int32) == state.step
        length = (state.step + 1).astype(jnp.float32)

        def with_end(buffer_BxT: jax.Array, values: jax.Array) -> jax.Array:
            return jnp.where(here, values.reshape(Q, W, 1), buffer_BxT.reshape(Q, W, T))

        ended = []
        for end in self.ends:
            log_p_QxW = log_p_QxWxV[:, :, end]
            ended.append(
                (
                    (search.live_QxW + log_p_QxW) / length**self.length_penalty,
                    with_end(state.tokens_BxT, jnp.full((Q, W), end, jnp.int32)),
                    with_end(state.log_probs_BxT, log_p_QxW),
                    with_end(state.gaps_BxT, gaps_B),
                )
            )
        return _with_ended(search, ended)

    def end_stopped(self, search: _Search, candidates: _Candidates, stopped_QxK: jax.Array) -> _Search:
        """The candidates that complete a stop string, among the ended texts if they are good enough."""
        state = search.state
        Q, W = search.live_QxW.shape
        T = state.tokens_BxT.shape[1]
        beams_QxK = candidates.beams_QxK
        length = (state.step + 1).astype(jnp.float32)

        def with_last(buffer_BxT: jax.Array, values_QxK: jax.Array) -> jax.Array:
            before_QxKxT = jnp.take_along_axis(buffer_BxT.reshape(Q, W, T), beams_QxK[:, :, None], 1)
            return jnp.where(jnp.arange(T, dtype=jnp.int32) == state.step, values_QxK[:, :, None], before_QxKxT)

        gaps_QxK = jnp.take_along_axis(candidates.gaps_QxW, beams_QxK, 1)
        stopped = (
            jnp.where(stopped_QxK, candidates.totals_QxK / length**self.length_penalty, -jnp.inf),
            with_last(state.tokens_BxT, candidates.tokens_QxK.astype(jnp.int32)),
            with_last(state.log_probs_BxT, candidates.log_probs_QxK),
            with_last(state.gaps_BxT, gaps_QxK),
        )
        return _with_ended(search, [stopped])

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
                    finished = made[0][-1] in self.ends
                    found.append(Hypothesis(*made, finished, float(score), not finished))
                if state.step == new_tokens and live_QxW[q, w] > -math.inf:
                    row, score = q * W + w, float(live_QxW[q, w]) / new_tokens**self.length_penalty
                    buffers = (state.tokens_BxT, state.log_probs_BxT, state.gaps_BxT)
                    rows = [buffer_BxT[row, :new_tokens] for buffer_BxT in buffers]
                    made = (rows[0].tolist(), rows[1].tolist(), rows[2].tolist())
                    found.append(Hypothesis(*made, False, score))
            results.append(sorted(found, key=lambda each: -each.score)[:W])
        return results


def _with_ended(search: _Search, ended: Sequence[tuple[jax.Array, ...]]) -> _Search:
    """The W best of the texts that had ended and of these: scores QxK and tokens, log_probs and gaps QxKxT of each."""
    kept = [(search.scores_QxW, search.tokens_QxWxT, search.log_probs_QxWxT, search.gaps_QxWxT), *ended]
    scores, *values = (jnp.concatenate(parts, 1) for parts in zip(*kept, strict=True))
    best_QxW, order_QxW = jax.lax.top_k(scores, search.scores_QxW.shape[1])
    tokens, log_probs, gaps = (jnp.take_along_axis(each, order_QxW[:, :, None], 1) for each in values)
    return replace(search, tokens_QxWxT=tokens, log_probs_QxWxT=log_probs, gaps_QxWxT=gaps, scores_QxW=best_QxW)


@functools.partial(jax.jit, static_argnames=("rules", "width"), donate_argnames="state")
def _run(
    rules: _Rules, width: int, params: dict[str, Any], state: DecodeState, threshold: jax.Array,
    routing_key: jax.Array | None,
) -> _Search:  # fmt: skip
    """The whole search, where there are no stop strings."""

    def one_token(search: _Search) -> _Search:
        search, candidates = rules.propose(params, search, width, threshold)
        return rules.go_on(params, search, candidates, None, routing_key)

    return jax.lax.while_loop(rules.is_unfinished, one_token, rules.begin(state, width))


@functools.partial(jax.jit, static_argnames=("rules", "width"), donate_argnames="state")
def _begin(rules: _Rules, width: int, state: DecodeState) -> _Search:
    return rules.begin(state, width)


@functools.partial(jax.jit, static_argnames="rules")
def _is_unfinished(rules: _Rules, search: _Search) -> jax.Array:
    return rules.is_unfinished(search)


@functools.partial(jax.jit, static_argnames=("rules", "count"), donate_argnames="search")
def _propose(
    rules: _Rules, count: int, params: dict[str, Any], search: _Search, threshold: jax.Array
) -> tuple[_Search, _Candidates]:  # fmt: skip
    return rules.propose(params, search, count, threshold)


@functools.partial(jax.jit, static_argnames="rules", donate_argnames="search")
def _go_on(
    rules: _Rules, params: dict[str, Any], search: _Search, candidates: _Candidates, picks_QxW: jax.Array,
    routing_key: jax.Array | None,
) -> _Search:  # fmt: skip
    return rules.go_on(params, search, candidates, picks_QxW, routing_key)


@functools.partial(jax.jit, static_argnames="rules", donate_argnames="search")
def _end_stopped(rules: _Rules, search: _Search, candidates: _Candidates, stopped_QxK: jax.Array) -> _Search:
    return rules.end_stopped(search, candidates, stopped_QxK)


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
    length_penalty: float = LENGTH_PENALTY,
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
      stop: strings that end a text. What it has said up to there is its score, the stop string included.
      think: when to think.
      encoded: the prompts' token ids, if they are not what `encode_prompts` makes of them.

    Returns:
      For each prompt the best texts, best first, without what routed blocks and thoughts were.
    """
    require(all(stop), "stop", tuple(stop), "must not be an empty string")
    ids = encode_prompts(tokenizer, prompts) if encoded is None else encoded
    watches = [StopWatch(tokenizer, prompt, stop) for prompt in prompts] if stop else []
    found = BeamSearch(generator, beams, length_penalty, think).search(ids, new_tokens, watches)
    return [
        [completion_of(tokenizer, prompt, each.generated(), new_tokens, stop) for each in hypotheses]
        for prompt, hypotheses in zip(prompts, found, strict=True)
    ]

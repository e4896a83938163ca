"""The rules of beam search, and the programs that they are compiled to: the beams of prompts as one pytree.

In each step every beam may end, which makes it a candidate for the W best ended texts, and the W most probable
continuations that don't end go on. `mod_star.decoding.beam` is the door to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.config import ThinkingConfig
from mod_star.decoding.generated import Generated
from mod_star.decoding.programs import think_in
from mod_star.decoding.sampling import log_prob_and_gap
from mod_star.decoding.state import DecodeState, reorder
from mod_star.decoding.step import NewTokens, decode_step
from mod_star.decoding.think import Think
from mod_star.model import Decoder
from mod_star.model.transformer import UnstackedParams, logits_of


@dataclass(frozen=True)
class Hypothesis:
    """One of the best texts of a beam search."""

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
class Search:
    """W beams for each of Q prompts, and the W best texts of each that have ended."""

    state: DecodeState
    live_QxW: jax.Array
    """float32 log-probabilities of the beams; -inf for beams that there aren't (yet)."""
    tokens_QxWxT: jax.Array
    """int32 of the ended texts, the end token included; -1 after it."""
    log_probs_QxWxT: jax.Array
    """float32, of these tokens."""
    gaps_QxWxT: jax.Array
    """float32, of these tokens."""
    scores_QxW: jax.Array
    """Of the ended texts, falling; -inf where there is none."""


@struct.dataclass
class Candidates:
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


@dataclass(frozen=True)
class Rules:
    """What a search is compiled for."""

    decoder: Decoder
    thinking: ThinkingConfig
    think: Think
    """Its threshold is data."""
    ends: tuple[int, ...]
    length_penalty: float

    def begin(self, state: DecodeState, W: int) -> Search:
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
        return Search(state, live_QxW, tokens, log_probs, gaps, scores)

    def is_unfinished(self, search: Search) -> jax.Array:
        """Whether there may be a better text."""
        # Log-probabilities only fall, so the most that a beam can come to is what it has over the greatest length.
        limit = search.state.limit
        reachable_Q = jnp.max(search.live_QxW, -1) / limit.astype(jnp.float32) ** self.length_penalty
        return (search.state.step < limit) & jnp.any(search.scores_QxW[:, -1] < reachable_Q)

    def propose(
        self, params: UnstackedParams, search: Search, count: int, threshold: jax.Array
    ) -> tuple[Search, Candidates]:
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
        return search, Candidates(totals_QxK, beams_QxK, tokens_QxK, log_probs_QxK, gaps_B.reshape(Q, W))

    def go_on(
        self, params: UnstackedParams, search: Search, candidates: Candidates, picks_QxW: jax.Array | None,
        routing_key: jax.Array | None,
    ) -> Search:  # fmt: skip
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
        new = NewTokens(tokens_B, state.lengths_B, state.step, (live_QxW > -jnp.inf).reshape(-1))
        hidden_BxD, caches = decode_step(self.decoder, params, state.caches, new, state.branches, routing_key)
        state = replace(
            state,
            caches=caches,
            hidden_BxD=hidden_BxD,
            tokens_BxT=write(state.tokens_BxT, tokens_B),
            log_probs_BxT=write(state.log_probs_BxT, log_probs_QxW.reshape(-1)),
            step=state.step + 1,
        )
        return replace(search, state=state, live_QxW=live_QxW)

    def _end(self, search: Search, log_p_QxWxV: jax.Array, gaps_B: jax.Array) -> Search:
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

    def end_stopped(self, search: Search, candidates: Candidates, stopped_QxK: jax.Array) -> Search:
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

    def hypotheses(self, search: Search, new_tokens: int) -> list[list[Hypothesis]]:
        """The best texts of each prompt that counts, best first."""
        state = jax.device_get(search.state)
        ended = jax.device_get((search.tokens_QxWxT, search.log_probs_QxWxT, search.gaps_QxWxT, search.scores_QxW))
        live_QxW = jax.device_get(search.live_QxW)
        W = live_QxW.shape[1]
        results = []
        for q in range(int(state.count)):
            texts: list[Hypothesis] = []
            for w in range(W):
                tokens, log_probs, gaps, score = (array[q, w] for array in ended)
                count = int((tokens >= 0).sum())
                if score > -math.inf:
                    by_token = (tokens[:count].tolist(), log_probs[:count].tolist(), gaps[:count].tolist())
                    finished = by_token[0][-1] in self.ends
                    texts.append(Hypothesis(*by_token, finished, float(score), not finished))
                if state.step == new_tokens and live_QxW[q, w] > -math.inf:
                    row, score = q * W + w, float(live_QxW[q, w]) / new_tokens**self.length_penalty
                    buffers = (state.tokens_BxT, state.log_probs_BxT, state.gaps_BxT)
                    rows = [buffer_BxT[row, :new_tokens] for buffer_BxT in buffers]
                    cut = (rows[0].tolist(), rows[1].tolist(), rows[2].tolist())
                    texts.append(Hypothesis(*cut, False, score))
            results.append(sorted(texts, key=lambda each: -each.score)[:W])
        return results


def _with_ended(search: Search, ended: Sequence[tuple[jax.Array, ...]]) -> Search:
    """The W best of the texts that had ended and of these: scores QxK and tokens, log_probs and gaps QxKxT of each."""
    hypotheses = [(search.scores_QxW, search.tokens_QxWxT, search.log_probs_QxWxT, search.gaps_QxWxT), *ended]
    scores, *values = (jnp.concatenate(parts, 1) for parts in zip(*hypotheses, strict=True))
    best_QxW, order_QxW = jax.lax.top_k(scores, search.scores_QxW.shape[1])
    tokens, log_probs, gaps = (jnp.take_along_axis(each, order_QxW[:, :, None], 1) for each in values)
    return replace(search, tokens_QxWxT=tokens, log_probs_QxWxT=log_probs, gaps_QxWxT=gaps, scores_QxW=best_QxW)


@functools.partial(jax.jit, static_argnames=("rules", "width"), donate_argnames="state")
def run_search(
    rules: Rules, width: int, params: UnstackedParams, state: DecodeState, threshold: jax.Array,
    routing_key: jax.Array | None,
) -> Search:  # fmt: skip
    """The whole search, where there are no stop strings."""

    def one_token(search: Search) -> Search:
        search, candidates = rules.propose(params, search, width, threshold)
        return rules.go_on(params, search, candidates, None, routing_key)

    return jax.lax.while_loop(rules.is_unfinished, one_token, rules.begin(state, width))


@functools.partial(jax.jit, static_argnames=("rules", "width"), donate_argnames="state")
def begin(rules: Rules, width: int, state: DecodeState) -> Search:
    """`Rules.begin` as a program."""
    return rules.begin(state, width)


@functools.partial(jax.jit, static_argnames="rules")
def is_unfinished(rules: Rules, search: Search) -> jax.Array:
    """`Rules.is_unfinished` as a program."""
    return rules.is_unfinished(search)


@functools.partial(jax.jit, static_argnames=("rules", "count"), donate_argnames="search")
def propose(
    rules: Rules, count: int, params: UnstackedParams, search: Search, threshold: jax.Array
) -> tuple[Search, Candidates]:  # fmt: skip
    """`Rules.propose` as a program."""
    return rules.propose(params, search, count, threshold)


@functools.partial(jax.jit, static_argnames="rules", donate_argnames="search")
def go_on(
    rules: Rules, params: UnstackedParams, search: Search, candidates: Candidates, picks_QxW: jax.Array,
    routing_key: jax.Array | None,
) -> Search:  # fmt: skip
    """`Rules.go_on` as a program."""
    return rules.go_on(params, search, candidates, picks_QxW, routing_key)


@functools.partial(jax.jit, static_argnames="rules", donate_argnames="search")
def end_stopped(rules: Rules, search: Search, candidates: Candidates, stopped_QxK: jax.Array) -> Search:
    """`Rules.end_stopped` as a program."""
    return rules.end_stopped(search, candidates, stopped_QxK)

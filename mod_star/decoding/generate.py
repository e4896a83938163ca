"""Generation: prefill the prompts once, then one `lax.while_loop` over a documented state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mod_star import streams
from mod_star.config import ThinkingConfig
from mod_star.decoding.caches import Cache, full_cache, in_place_options, routed_cache, text_of
from mod_star.decoding.generated import Generated, results_of
from mod_star.decoding.sampling import Sampling, draw, log_prob_and_gap, ranked_tokens
from mod_star.decoding.state import DecodeState, take_prompts
from mod_star.decoding.step import decode_step, narrowed, unstack
from mod_star.decoding.think import Think, ThoughtRecord, empty_record, think_step
from mod_star.errors import InputError, require
from mod_star.model import Decoder
from mod_star.model.routing import causal_slots
from mod_star.model.transformer import block_names, group_count, logits_of
from mod_star.sharding import batch_sharding, replicated, use_mesh

PROMPT_MULTIPLE = 32
"""Prompts are padded to a multiple of this, so that few programs are compiled for prompts of many lengths."""
MANY_MULTIPLE = 128
"""The same for collections of prompts, where compilation costs more than padding."""
NEVER = Think()
Stop = Callable[[list[Generated]], Sequence[bool]]


class Generator:
    """Generates with one model. Compiles once per (batch size, padded prompt length, room, sampling, way of thinking).

    Args:
      decoder: the model.
      params: its parameters as trained (stacked).
      end_ids: tokens that end a row.
      routing_key: for models with stochastic routing; `jax.random.key(0)` if not given, as in scoring.
      thinking: length and kind of thoughts, for a model that can think; `params` then has the entry "thinking".
      mesh: where `params` lie, if on several devices. Prompts and their rows are shared out over data and fsdp where
        their number allows.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: dict[str, Any],
        end_ids: Sequence[int] = (),
        routing_key: jax.Array | None = None,
        thinking: ThinkingConfig | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.decoder, self._mesh = decoder, mesh
        self.thinking = ThinkingConfig() if thinking is None else thinking
        self._can_think = thinking is not None and "thinking" in params
        self._stacked = narrowed(decoder, params)
        self.params = unstack(decoder, self._stacked)
        self._end_ids = tuple(end_ids)
        self._routing_key = None
        if decoder.routing.selection == "stochastic":
            self._routing_key = jax.random.key(0) if routing_key is None else routing_key
        self._prefill = jax.jit(self._prefill_fn, static_argnames=("room", "slots", "branches"))
        self._advance = jax.jit(
            self._advance_fn,
            static_argnames=("sampling", "think"),
            donate_argnames=("state",),
            compiler_options=in_place_options(),
        )

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        seed: int = 0,
        branches: int = 1,
        numbers: Sequence[int] | None = None,
        multiple: int = PROMPT_MULTIPLE,
    ) -> DecodeState:
        """Runs the prompts and returns the state before the first new token.

        Args:
          prompts: token ids, at least one per prompt; lengths may differ.
          new_tokens: the most tokens to generate per row (T).
          seed: of the rows' random keys.
          branches: rows per prompt. They share its keys/values, which are computed once.
          numbers: of the prompts in a larger collection: with one seed, rows of one number draw the same wherever
            they are. 0, 1, ... by default.
          multiple: prompts are padded to a multiple of this, as far as the context allows.

        Raises:
          InputError: a prompt is empty, holds an id that the model doesn't have, or leaves no room for `new_tokens` in
            the model's context.
        """
        self._check(prompts, new_tokens)
        require(branches >= 1, "branches", branches, "must be at least 1")
        context = self.decoder.config.context
        longest = max(map(len, prompts))
        padded = min(-(-longest // multiple) * multiple, context - new_tokens)
        tokens = np.zeros((len(prompts), padded), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        first = np.arange(len(prompts)) if numbers is None else np.asarray(numbers)
        rows = (first[:, None] * branches + np.arange(branches)).reshape(-1)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(rows, jnp.uint32))
        lengths = jnp.array([len(prompt) for prompt in prompts], jnp.int32)
        # The slots do not depend on how prompts are padded, so neither does what is generated.
        slots = causal_slots(self.decoder.routing, context)
        prompts_QxP, lengths, keys = self._shared_out((jnp.asarray(tokens), lengths, keys))
        with use_mesh(self._mesh):
            return self._prefill(
                self._stacked, prompts_QxP, lengths, keys, room=new_tokens, slots=slots, branches=branches
            )  # fmt: skip

    def _shared_out(self, arrays: Any) -> Any:
        """Arrays with a leading axis of prompts or rows, on the mesh."""
        if self._mesh is None:
            return arrays
        Q = arrays[0].shape[0]
        shares = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        where = replicated(self._mesh) if Q % shares else batch_sharding(self._mesh)
        return jax.device_put(arrays, where)

    def _check(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        context, V = self.decoder.config.context, self.decoder.config.vocab_size
        require(len(prompts) > 0, "prompts", list(prompts), "must be at least one")
        allowed = f"must lie in [1, {context - 1}] (context {context} minus a token of the prompt)"
        require(1 <= new_tokens < context, "new_tokens", new_tokens, allowed)
        for number, prompt in enumerate(prompts, 1):
            if not 1 <= len(prompt) <= context - new_tokens:
                raise InputError(
                    f"prompt {number} = {len(prompt)} tokens: must have 1 to {context - new_tokens} "
                    f"(context {context} minus {new_tokens} new tokens)"
                )
            if not 0 <= min(prompt) <= max(prompt) < V:
                raise InputError(f"prompt {number}: token ids must lie in [0, {V}), has {min(prompt)} to {max(prompt)}")

    def _prefill_fn(
        self, params: dict[str, Any], tokens_QxP: jax.Array, lengths_Q: jax.Array, keys_B: jax.Array, room: int,
        slots: int, branches: int = 1,
    ) -> DecodeState:  # fmt: skip
        Q, P = tokens_QxP.shape
        B = Q * branches
        segment_ids_QxP = (jnp.arange(P, dtype=jnp.int32) < lengths_Q[:, None]).astype(jnp.int32)
        positions_P = jnp.arange(P, dtype=jnp.int32)

        def run(tokens_P: jax.Array, segment_ids_P: jax.Array) -> Any:
            return self.decoder.apply(
                {"params": params}, tokens_P, positions_P, segment_ids_P, mode="causal", slots=slots,
                key=self._routing_key, keep_keys_values=True,
            )  # fmt: skip

        output = jax.vmap(run)(tokens_QxP, segment_ids_QxP)
        caches: list[Cache] = []
        for group in range(group_count(self.decoder.config, self.decoder.routing)):
            for name in block_names(self.decoder.routing):
                prompt = jax.tree.map(lambda leaf, group=group: leaf[:, group], output.keys_values[name])
                if name == "routed":
                    overflow_Q = jnp.sum(output.trace.overflow[:, group], -1, dtype=jnp.int32)
                    caches.append(routed_cache(prompt, overflow_Q, slots, room, branches))
                else:
                    caches.append(full_cache(prompt, room, branches))
        last_QxD = jnp.take_along_axis(output.hidden, (lengths_Q - 1)[:, None, None], 1)[:, 0]
        return DecodeState(
            caches=tuple(caches),
            hidden_BxD=jnp.repeat(last_QxD, branches, 0),
            tokens_BxT=jnp.full((B, room), -1, jnp.int32),
            log_probs_BxT=jnp.zeros((B, room), jnp.float32),
            gaps_BxT=jnp.zeros((B, room), jnp.float32),
            step=jnp.zeros((), jnp.int32),
            done_B=jnp.zeros(B, bool),
            lengths_B=jnp.repeat(lengths_Q, branches),
            keys_B=keys_B,
            record=empty_record(B, room, self.thinking) if self._can_think else None,
            branches=branches,
        )

    def advance(self, state: DecodeState, until: int, sampling: Sampling, think: Think = NEVER) -> DecodeState:
        """Generates until `until` tokens per row exist or every row is finished. Consumes `state`.

        Raises:
          InputError: the model is asked to think and can't.
        """
        self._check_thinking(think)
        until = min(until, state.tokens_BxT.shape[1])
        # The threshold is data: a new one is no new program.
        threshold, fixed = jnp.float32(think.threshold or 0.0), replace(think, threshold=0.0)
        fixed = NEVER if think.when == "never" else fixed
        with use_mesh(self._mesh):
            return self._advance(self.params, state, jnp.int32(until), threshold, sampling=sampling, think=fixed)

    def _check_sampling(self, sampling: Sampling, think: Think, branches: int) -> None:
        """Raises InputError for what can't be, before anything is compiled."""
        V = self.decoder.config.vocab_size
        allowed = f"must be at most the vocabulary, {V}: each branch starts with another token"
        require(not sampling.branch or branches <= V, "branches", branches, allowed)
        self._check_thinking(think)

    def _check_thinking(self, think: Think) -> None:
        possible = self._can_think or think.when == "never"
        require(possible, "think.when", think.when, "must be never, the model has not learned to think")

    def _advance_fn(
        self,
        params: dict[str, Any],
        state: DecodeState,
        until: jax.Array,
        threshold: jax.Array | float = 0.0,
        *,
        sampling: Sampling,
        think: Think = NEVER,
    ) -> DecodeState:
        def unfinished(state: DecodeState) -> jax.Array:
            return (state.step < until) & ~jnp.all(state.done_B)

        def one_token(state: DecodeState) -> DecodeState:
            keys_B = jax.vmap(lambda key: jax.random.fold_in(key, state.step))(state.keys_B)
            if think.when == "never":
                logits_BxV, thoughts = logits_of(params, state.hidden_BxD), None
            else:
                logits_BxV, thoughts = self._think(params, state, think, threshold)
            tokens_B = jax.vmap(functools.partial(draw, sampling=sampling))(keys_B, logits_BxV)
            if sampling.branch:
                ranked = functools.partial(ranked_tokens, logits_BxV, state.branches)
                tokens_B = jax.lax.cond(state.step == 0, ranked, lambda: tokens_B)
            log_probs_B, gaps_B = log_prob_and_gap(logits_BxV, tokens_B)
            ends_B = functools.reduce(jnp.logical_or, [tokens_B == i for i in self._end_ids], state.done_B)
            hidden_BxD, caches = decode_step(
                self.decoder, params, state.caches, tokens_B, state.lengths_B, state.step, ~ends_B,
                state.branches, self._routing_key,
            )  # fmt: skip

            def write(buffer: jax.Array, values: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(buffer, values[:, None], state.step, 1)

            def column(buffer: jax.Array, values_B: jax.Array, none: float) -> jax.Array:
                return write(buffer, jnp.where(state.done_B, none, values_B).astype(buffer.dtype))

            return replace(
                state,
                caches=caches,
                hidden_BxD=hidden_BxD,
                tokens_BxT=column(state.tokens_BxT, tokens_B, -1),
                log_probs_BxT=column(state.log_probs_BxT, log_probs_B, 0.0),
                gaps_BxT=column(state.gaps_BxT, gaps_B, 0.0),
                step=state.step + 1,
                done_B=ends_B,
                record=state.record if thoughts is None else jax.tree.map(write, state.record, thoughts),
            )

        return jax.lax.while_loop(unfinished, one_token, state)

    def _think(
        self, params: dict[str, Any], state: DecodeState, think: Think, threshold: jax.Array | float
    ) -> tuple[jax.Array, ThoughtRecord]:
        """Logits and record of one step, see `think_step`."""
        fold = lambda key: jax.random.fold_in(jax.random.fold_in(key, streams.THOUGHTS), state.step)  # noqa: E731
        text = text_of(self.decoder.routing, state.caches, state.lengths_B, state.step)
        return think_step(
            self.decoder, params, self.thinking, think, threshold, state.hidden_BxD, text,
            state.lengths_B + state.step - 1, jax.vmap(fold)(state.keys_B), ~state.done_B, state.branches,
        )  # fmt: skip

    def results(self, state: DecodeState) -> list[Generated]:
        """What has been generated up to now, row by row."""
        return results_of(state, self._end_ids)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        burst: int = 8,
        stop: Stop | None = None,
        think: Think = NEVER,
        branches: int = 1,
    ) -> Iterator[list[Generated]]:
        """Yields the results so far after every `burst` tokens; the last one yielded is complete.

        Args:
          prompts: as for `start`.
          new_tokens: as for `start`.
          sampling: how to draw.
          seed: as for `start`.
          burst: tokens per row between two results.
          stop: sees the results before they are yielded, and says for each row whether to end it here; None: never.
          think: when to think.
          branches: as for `start`.
        """
        require(burst >= 1, "burst", burst, "must be at least 1")
        self._check_sampling(sampling, think, branches)
        state = self.start(prompts, new_tokens, seed, branches)
        for until in range(burst, new_tokens + burst, burst):
            state = self.advance(state, until, sampling, think)
            results = self.results(state)
            if stop is not None:
                state = replace(state, done_B=state.done_B | jnp.asarray(stop(results), bool))
            yield results
            if bool(jnp.all(state.done_B)):
                return

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        think: Think = NEVER,
        branches: int = 1,
    ) -> list[Generated]:
        """All at once: `new_tokens` tokens per row, or fewer where an end token comes first."""
        self._check_sampling(sampling, think, branches)
        return self.results(self.advance(self.start(prompts, new_tokens, seed, branches), new_tokens, sampling, think))

    def generate_many(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        sampling: Sampling,
        *,
        rows: int,
        branches: int = 1,
        seed: int = 0,
        burst: int = 16,
        stop: Callable[[int, list[Generated]], Sequence[bool]] | None = None,
        think: Think = NEVER,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Generated]]]:
        """Any number of prompts, in batches of prompts of about equal length; yields each when it is finished.

        A batch goes on with half of its prompts when the others are finished, and once more with a quarter. That makes
        three programs for each padded length, of which there are few.

        Args:
          prompts: as for `start`. What is drawn for a prompt depends on its number, not on its batch.
          new_tokens: as for `start`.
          sampling: how to draw.
          rows: of a batch, at the most; at least `branches`.
          branches: as for `start`.
          seed: as for `start`.
          burst: tokens per row between two looks at what is finished.
          stop: sees a prompt's index and its results so far, and says for each branch whether to end it.
          think: when to think.
          numbers: as for `start`, where these prompts are only some of a collection.

        Yields:
          A prompt's index here and its branches.
        """
        require(rows >= branches, "rows", rows, f"must be at least the number of branches, {branches}")
        self._check(prompts, new_tokens)
        self._check_sampling(sampling, think, branches)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        at_once = min(rows // branches, len(order))
        for first in range(0, len(order), at_once):
            batch = order[first : first + at_once]
            # The last batch is filled up, with rows that are finished from the start: no program for it alone.
            filled = batch + batch[-1:] * (at_once - len(batch))
            drawn = filled if numbers is None else [numbers[i] for i in filled]
            state = self.start([prompts[i] for i in filled], new_tokens, seed, branches, drawn)
            absent = np.repeat(np.arange(at_once) >= len(batch), branches)
            state = replace(state, done_B=jnp.asarray(absent))
            yield from self._finish_batch(state, np.array(filled), len(batch), sampling, burst, stop, think)

    def _finish_batch(
        self, state: DecodeState, numbers_Q: np.ndarray, real: int, sampling: Sampling, burst: int,
        stop: Callable[[int, list[Generated]], Sequence[bool]] | None, think: Think,
    ) -> Iterator[tuple[int, list[Generated]]]:  # fmt: skip
        """Runs a batch to its end. Only the first `real` of its prompts count."""
        k, room = state.branches, state.tokens_BxT.shape[1]
        told_Q = np.arange(len(numbers_Q)) >= real
        sizes = (-(-len(numbers_Q) // 4), -(-len(numbers_Q) // 2))
        for until in range(burst, room + burst, burst):
            state = self.advance(state, until, sampling, think)
            results = self.results(state)
            of_prompt = [results[q * k : (q + 1) * k] for q in range(len(numbers_Q))]
            done_QxK = np.array(state.done_B).reshape(-1, k)
            if stop is not None:
                for q in np.flatnonzero(~told_Q):
                    done_QxK[q] |= np.asarray(stop(int(numbers_Q[q]), of_prompt[q]), bool)
                state = replace(state, done_B=jnp.asarray(done_QxK.reshape(-1)))
            for q in np.flatnonzero(~told_Q & (done_QxK.all(1) | (until >= room))):
                told_Q[q] = True
                yield int(numbers_Q[q]), of_prompt[q]
            if told_Q.all():
                return
            size = next((size for size in sizes if size >= (~told_Q).sum()), len(numbers_Q))
            if size < len(numbers_Q):  # stable: the unfinished ones, then finished ones to fill up
                kept = np.argsort(told_Q, kind="stable")[:size].astype(np.int32)
                state, numbers_Q, told_Q = take_prompts(state, kept), numbers_Q[kept], told_Q[kept]

    def warm_up(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        sampling: Sampling,
        think: Think = NEVER,
        branches: int = 1,
    ) -> None:
        """Compiles what generating with these arguments takes, so that the next call can be timed. Draws no token."""
        self._check_sampling(sampling, think, branches)
        jax.block_until_ready(self.advance(self.start(prompts, new_tokens, branches=branches), 0, sampling, think))

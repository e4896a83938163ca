"""Generation: prefill the prompts once, then one `lax.while_loop` over a documented state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mod_star.config import ThinkingConfig
from mod_star.decoding import programs
from mod_star.decoding.generated import Generated, results_of
from mod_star.decoding.lengths import PROMPT, ROOM, ROOM_OF_MANY, rounded_up
from mod_star.decoding.sampling import Sampling, compiled_for
from mod_star.decoding.state import DecodeState, take_prompts
from mod_star.decoding.step import own_params
from mod_star.decoding.think import Think
from mod_star.distributed.sharding import batch_sharding, replicated, use_mesh
from mod_star.errors import InputError, require
from mod_star.model import Decoder

NEVER = Think()
Stop = Callable[[list[Generated]], Sequence[bool]]
ENDS = 8
"""End tokens are data, filled up to a multiple of this."""


class Generator:
    """Generates with one model. Batch sizes, prompt lengths and room are rounded up, see `mod_star.decoding.lengths`;
    for each combination that comes up, one program is compiled for prompts and one for new tokens, for all generators.

    It holds the weights once, unstacked and in memory of its own: what becomes of `params` later, it does not matter.

    Args:
      decoder: the model.
      params: its parameters as trained (stacked).
      end_ids: tokens that end a row.
      routing_key: for models with stochastic routing; `jax.random.key(0)` if not given, as in scoring.
      thinking: length and kind of thoughts, for a model that can think; `params` then has the entry "thinking".
      mesh: where `params` lie, if on several devices. Prompts and their rows are shared out over data and fsdp where
        their number allows.
      donate: `params` are given away: their arrays are deleted while they are taken over, so that the weights never
        exist twice.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: dict[str, Any],
        end_ids: Sequence[int] = (),
        routing_key: jax.Array | None = None,
        thinking: ThinkingConfig | None = None,
        mesh: Mesh | None = None,
        donate: bool = False,
    ) -> None:
        self.decoder, self._mesh = decoder, mesh
        self.thinking = ThinkingConfig() if thinking is None else thinking
        self._can_think = thinking is not None and "thinking" in params
        self.params = own_params(decoder, params, donate)
        self._end_ids = tuple(end_ids)
        self._ends_E = np.full(-(-max(1, len(self._end_ids)) // ENDS) * ENDS, -1, np.int32)
        self._ends_E[: len(self._end_ids)] = self._end_ids
        self._routing_key = None
        if decoder.routing.selection == "stochastic":
            self._routing_key = jax.random.key(0) if routing_key is None else routing_key

    @property
    def _recorded(self) -> ThinkingConfig | None:
        """What thoughts are recorded of; None for a model that can't think."""
        return self.thinking if self._can_think else None

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        seed: int = 0,
        branches: int = 1,
        numbers: Sequence[int] | None = None,
    ) -> DecodeState:
        """Runs the prompts and returns the state before the first new token.

        Args:
          prompts: token ids, at least one per prompt; lengths may differ.
          new_tokens: the most tokens to generate per row.
          seed: of the rows' random keys.
          branches: rows per prompt. They share its keys/values, which are computed once.
          numbers: of the prompts in a larger collection: with one seed, rows of one number draw the same wherever
            they are. 0, 1, ... by default.

        Raises:
          InputError: a prompt is empty, holds an id that the model doesn't have, or leaves no room for `new_tokens` in
            the model's context.
        """
        self._check(prompts, new_tokens)
        require(branches >= 1, "branches", branches, "must be at least 1")
        room = rounded_up(new_tokens, ROOM, self.decoder.config.context)
        batch = rounded_up(len(prompts), 1, 2 * len(prompts))
        numbers = range(len(prompts)) if numbers is None else numbers
        return self._start(prompts, new_tokens, seed, branches, numbers, batch, room)

    def _start(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, seed: int, branches: int, numbers: Sequence[int],
        batch: int, room: int,
    ) -> DecodeState:  # fmt: skip
        """`start`, in a batch of that many prompts and with that much room; copies of the last prompt fill it up."""
        filled = [*prompts, *[prompts[-1]] * (batch - len(prompts))]
        first = np.asarray([*numbers, *[numbers[-1]] * (batch - len(prompts))])
        tokens = np.zeros((batch, rounded_up(max(map(len, filled)), PROMPT, self.decoder.config.context)), np.int32)
        for row, prompt in zip(tokens, filled, strict=True):
            row[: len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in filled], np.int32)
        rows = (first[:, None] * branches + np.arange(branches)).reshape(-1).astype(np.uint32)
        tokens_QxP, lengths_Q, rows_B = self._shared_out((tokens, lengths, rows))
        made = programs.Prompts(
            tokens_QxP, lengths_Q, rows_B, np.int32(len(prompts)), np.int32(new_tokens), jax.random.key(seed)
        )
        with use_mesh(self._mesh):
            return programs.prefill(
                self.decoder, self._recorded, self.params, made, self._routing_key, room=room, branches=branches
            )

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

    def advance(self, state: DecodeState, until: int, sampling: Sampling, think: Think = NEVER) -> DecodeState:
        """Generates until `until` tokens per row exist or every row is finished. Consumes `state`.

        Raises:
          InputError: the model is asked to think and can't.
        """
        self._check_thinking(think)
        fixed = NEVER if think.when == "never" else replace(think, threshold=0.0)
        bounds = programs.Bounds(
            np.int32(until), np.float32(think.threshold or 0.0), np.float32(sampling.temperature),
            np.float32(sampling.top_p), self._ends_E,
        )  # fmt: skip
        with use_mesh(self._mesh):
            advanced: DecodeState = programs.advance_program()(
                self.decoder, self._recorded, self.params, state, bounds, self._routing_key,
                sampling=compiled_for(sampling), think=fixed,
            )  # fmt: skip
        return advanced

    def _check_sampling(self, sampling: Sampling, think: Think, branches: int) -> None:
        """Raises InputError for what can't be, before anything is compiled."""
        V = self.decoder.config.vocab_size
        allowed = f"must be at most the vocabulary, {V}: each branch starts with another token"
        require(not sampling.branch or branches <= V, "branches", branches, allowed)
        self._check_thinking(think)

    def _check_thinking(self, think: Think) -> None:
        possible = self._can_think or think.when == "never"
        require(possible, "think.when", think.when, "must be never, the model has not learned to think")

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
                state = replace(state, done_B=_ended(state, stop(results)))
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
          rows: the most of a batch; at least `branches`.
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
        at_once = min(rows // branches, rounded_up(len(order), 1, 2 * len(order)))
        room = min(-(-new_tokens // ROOM_OF_MANY) * ROOM_OF_MANY, self.decoder.config.context)
        for first in range(0, len(order), at_once):
            batch = order[first : first + at_once]
            drawn = batch if numbers is None else [numbers[i] for i in batch]
            # The last batch is filled up: no program for it alone.
            state = self._start([prompts[i] for i in batch], new_tokens, seed, branches, drawn, at_once, room)
            yield from self._finish_batch(state, np.array(batch), new_tokens, sampling, burst, stop, think)

    def _finish_batch(
        self, state: DecodeState, numbers_N: np.ndarray, new_tokens: int, sampling: Sampling, burst: int,
        stop: Callable[[int, list[Generated]], Sequence[bool]] | None, think: Think,
    ) -> Iterator[tuple[int, list[Generated]]]:  # fmt: skip
        """Runs a batch to its end. The first N of its prompts have these numbers and count, the others fill it up."""
        k, Q = state.branches, len(state.lengths_B) // state.branches
        numbers_Q = np.pad(numbers_N, (0, Q - len(numbers_N)), constant_values=-1)
        told_Q = numbers_Q < 0
        sizes = (-(-Q // 4), -(-Q // 2))
        for until in range(burst, new_tokens + burst, burst):
            state = self.advance(state, until, sampling, think)
            results = self.results(state)
            of_prompt = [results[first : first + k] for first in range(0, len(results), k)]
            done_QxK = np.array(state.done_B).reshape(-1, k)
            if stop is not None:
                for q in np.flatnonzero(~told_Q):
                    done_QxK[q] |= np.asarray(stop(int(numbers_Q[q]), of_prompt[q]), bool)
                state = replace(state, done_B=jnp.asarray(done_QxK.reshape(-1)))
            for q in np.flatnonzero(~told_Q & (done_QxK.all(1) | (until >= new_tokens))):
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


def _ended(state: DecodeState, told: Sequence[bool]) -> jax.Array:
    """Which rows are finished when some have been told to end; `told` leaves out the rows that fill up the batch."""
    ended_B = np.ones(len(state.done_B), bool)
    ended_B[: len(told)] = told
    return state.done_B | jnp.asarray(ended_B)

"""Generation: prefill the prompts once, then one `lax.while_loop` over a documented state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mod_star.config import ThinkingConfig
from mod_star.decoding import programs
from mod_star.decoding.generated import Generated, results_of
from mod_star.decoding.generation_config import GenerationConfig
from mod_star.decoding.lengths import PROMPT, ROOM, ROOM_OF_MANY, coarse, rounded_up
from mod_star.decoding.sampling import Sampling, compiled_for
from mod_star.decoding.state import DecodeState, take_prompts
from mod_star.decoding.step import is_on_disk, own_params
from mod_star.decoding.think import NEVER, Think
from mod_star.distributed.sharding import batch_sharding, replicated, use_mesh
from mod_star.errors import InputError, require
from mod_star.freed_memory import give_back_freed_memory
from mod_star.loaded_model import Model
from mod_star.model.transformer import StackedParams, UnstackedParams

Stop = Callable[[list[Generated]], Sequence[bool]]
BURST, BURST_OF_MANY = 8, 16
"""Tokens per row between two looks at what is finished, in one batch and in a collection."""
ENDS = 8
"""End tokens are data, filled up to a multiple of this."""


class Generator:
    """Generates with one model. Batch sizes, prompt lengths and room are rounded up, see `mod_star.decoding.lengths`;
    what comes up is compiled for all generators: a small program for prompts, and one for new tokens, which takes
    seconds but is the same for prompts of many lengths.

    It holds the weights once, unstacked and in memory of its own: what becomes of `model.params` later, it does not
    matter. On a mesh, prompts and their rows are shared out over data and fsdp where their number allows.

    Args:
      model: what generates.
      end_ids: tokens that end a row; None: the tokenizer's.
      donate: the model's parameters are given away: their arrays are deleted while they are taken over, so that the
        weights never exist twice.

    Parameters that are on disk, as `mod_star.runs.directory.load_run` can leave them, are read at their first use. Call
    `warm_up` before: the memory that compiling takes is free again then.
    """

    def __init__(self, model: Model, end_ids: Sequence[int] | None = None, donate: bool = False) -> None:
        self.decoder, self.tokenizer, self.mesh = model.decoder, model.tokenizer, model.mesh
        self.thinking = ThinkingConfig() if model.thinking is None else model.thinking
        self.routing_key = model.routing_key_in_force
        self.end_ids = tuple(model.tokenizer.end_ids if end_ids is None else end_ids)
        self._can_think = model.can_think
        self._given: StackedParams | None = model.params  # until they are taken over
        self._donate = donate
        if not is_on_disk(model.params):
            _ = self.params  # now: the model's own may be changed or deleted afterwards
        self._ends_E = np.full(-(-max(1, len(self.end_ids)) // ENDS) * ENDS, -1, np.int32)
        self._ends_E[: len(self.end_ids)] = self.end_ids

    @functools.cached_property
    def params(self) -> UnstackedParams:
        """The weights, in the form that programs take them."""
        assert self._given is not None
        own = own_params(self.decoder, self._given, self._donate)
        self._given = None
        return own

    @property
    def _recorded(self) -> ThinkingConfig | None:
        """What thoughts are recorded of; None for a model that can't think."""
        return self.thinking if self._can_think else None

    def start(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, numbers: Sequence[int] | None = None
    ) -> DecodeState:
        """Runs the prompts and returns the state before the first new token.

        Args:
          prompts: token ids, at least one per prompt; lengths may differ.
          config: how many new tokens and branches there may be, and the seed of the rows' random keys. A prompt's
            branches share its keys/values, which are computed once.
          numbers: of the prompts in a larger collection: with one seed, rows of one number draw the same wherever
            they are. 0, 1, ... by default.

        Raises:
          InputError: a prompt is empty, holds an id that the model doesn't have, or leaves no room for the new tokens
            in the model's context.
        """
        self._check_prompts(prompts, config.new_tokens)
        return self._start(self._padded(prompts, config, numbers), config, self._room(prompts, config))

    def _room(self, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> int:
        """Slots for new tokens in a batch of these prompts."""
        room = rounded_up(config.new_tokens, ROOM, self.decoder.config.context)
        return coarse(room, _batch(prompts) * config.rows_per_prompt, self.decoder.config.context)

    def _start(self, padded: programs.Prompts, config: GenerationConfig, room: int) -> DecodeState:
        """`start`, with that much room."""
        with use_mesh(self.mesh):
            return programs.prefill(
                self.decoder, self._recorded, self.params, padded, self.routing_key,
                size=self._size(padded, config, room),
            )  # fmt: skip

    def _size(self, padded: programs.Prompts, config: GenerationConfig, room: int) -> programs.Size:
        Q, P = padded.tokens_QxP.shape
        branches = config.rows_per_prompt
        slots = coarse(P, Q * branches, self.decoder.config.context)
        return programs.Size(slots, room, branches, config.confidence)

    def _padded(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, numbers: Sequence[int] | None = None,
        batch: int | None = None,
    ) -> programs.Prompts:  # fmt: skip
        """A batch of that many prompts; copies of the last one fill it up. None: the next size that there are programs
        for."""
        batch = _batch(prompts) if batch is None else batch
        numbers = range(len(prompts)) if numbers is None else numbers
        filled = [*prompts, *[prompts[-1]] * (batch - len(prompts))]
        first = np.asarray([*numbers, *[numbers[-1]] * (batch - len(prompts))])
        tokens = np.zeros((batch, rounded_up(max(map(len, filled)), PROMPT, self.decoder.config.context)), np.int32)
        for row, prompt in zip(tokens, filled, strict=True):
            row[: len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in filled], np.int32)
        rows = (first[:, None] * (config.branches or 1) + np.array(config.numbers_of_branches)).reshape(-1)
        tokens_QxP, lengths_Q, rows_B = self._shared_out((tokens, lengths, rows.astype(np.uint32)))
        count, limit = np.int32(len(prompts)), np.int32(config.new_tokens)
        return programs.Prompts(tokens_QxP, lengths_Q, rows_B, count, limit, jax.random.key(config.seed))

    def _shared_out(self, arrays: Any) -> Any:
        """Arrays with a leading axis of prompts or rows, on the mesh."""
        if self.mesh is None:
            return arrays
        Q = arrays[0].shape[0]
        shares = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        where = replicated(self.mesh) if Q % shares else batch_sharding(self.mesh)
        return jax.device_put(arrays, where)

    def _check_prompts(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
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
        self.require_thinking(think)
        bounds, static = self._advance_inputs(until, sampling, think)
        with use_mesh(self.mesh):
            advanced: DecodeState = programs.advance_program()(
                self.decoder, self._recorded, self.params, state, bounds, self.routing_key, **static
            )
        return advanced

    def _advance_inputs(self, until: int, sampling: Sampling, think: Think) -> tuple[programs.Bounds, dict[str, Any]]:
        """What a call of `programs.advance_program()` is told as data, and what it is compiled for."""
        bounds = programs.Bounds(
            np.int32(until), np.float32(think.threshold or 0.0), np.float32(sampling.temperature),
            np.float32(sampling.top_p), np.float32(sampling.min_p), self._ends_E,
        )  # fmt: skip
        fixed = NEVER if think.when == "never" else replace(think, threshold=0.0)
        return bounds, {"sampling": compiled_for(sampling), "think": fixed}

    def check(self, config: GenerationConfig) -> None:
        """Raises InputError for what this model can't be asked, before anything is compiled."""
        V, branches = self.decoder.config.vocab_size, config.rows_per_prompt
        allowed = f"must be at most the vocabulary, {V}: each branch starts with another token"
        require(not config.drawn.branch or branches <= V, "branches", branches, allowed)
        self.require_thinking(config.think)

    def require_thinking(self, think: Think) -> None:
        """Raises InputError if the model is asked to think and has not learned to."""
        possible = self._can_think or think.when == "never"
        require(possible, "think.when", think.when, "must be never: the model has not learned to think")

    def results(self, state: DecodeState) -> list[Generated]:
        """What has been generated up to now, row by row."""
        return results_of(state, self.end_ids)

    def stream(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, stop: Stop | None = None
    ) -> Iterator[list[Generated]]:
        """Yields the results so far after every `config.burst` tokens; the last one yielded is complete.

        Args:
          prompts: as for `start`.
          config: what is generated. Its stop strings are for texts: see `complete`.
          stop: sees the results before they are yielded, and says for each row whether to end it here; None: never.
        """
        self.check(config)
        state, burst = self.start(prompts, config), config.burst or BURST
        for until in range(burst, config.new_tokens + burst, burst):
            state = self.advance(state, until, config.drawn, config.think)
            results = self.results(state)
            if stop is not None:
                state = replace(state, done_B=_ended(state, stop(results)))
            yield results
            if bool(jnp.all(state.done_B)):
                return

    def generate(self, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[Generated]:
        """All at once: `config.new_tokens` tokens per row, or fewer where an end token comes first."""
        self.check(config)
        return self.results(self.advance(self.start(prompts, config), config.new_tokens, config.drawn, config.think))

    def generate_many(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        stop: Callable[[int, list[Generated]], Sequence[bool]] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Generated]]]:
        """Any number of prompts, in batches of prompts of about equal length; yields each when it is finished.

        A batch goes on with half of its prompts when the others are finished, and once more with a quarter. That makes
        three programs for each padded length, of which there are few.

        Args:
          prompts: as for `start`. What is drawn for a prompt depends on its number, not on its batch.
          config: what is generated, `config.rows` rows at a time.
          stop: sees a prompt's index and its results so far, and says for each branch whether to end it.
          numbers: as for `start`, where these prompts are only some of a collection.

        Yields:
          A prompt's index here and its branches.
        """
        branches = config.rows_per_prompt
        rows = len(prompts) * branches if config.rows is None else config.rows
        require(rows >= branches, "rows", rows, f"must be at least the number of branches, {branches}")
        self._check_prompts(prompts, config.new_tokens)
        self.check(config)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        at_once = min(rows // branches, rounded_up(len(order), 1, 2 * len(order)))
        room = min(-(-config.new_tokens // ROOM_OF_MANY) * ROOM_OF_MANY, self.decoder.config.context)
        for first in range(0, len(order), at_once):
            batch = order[first : first + at_once]
            drawn = batch if numbers is None else [numbers[i] for i in batch]
            # The last batch is filled up: no program for it alone.
            padded = self._padded([prompts[i] for i in batch], config, drawn, at_once)
            state = self._start(padded, config, room)
            yield from self._finish_batch(state, np.array(batch), config, stop)

    def _finish_batch(
        self, state: DecodeState, numbers_N: np.ndarray, config: GenerationConfig,
        stop: Callable[[int, list[Generated]], Sequence[bool]] | None,
    ) -> Iterator[tuple[int, list[Generated]]]:  # fmt: skip
        """Runs a batch to its end. The first N of its prompts have these numbers and count, the others fill it up."""
        k, Q = state.branches, len(state.lengths_B) // state.branches
        numbers_Q = np.pad(numbers_N, (0, Q - len(numbers_N)), constant_values=-1)
        finished_Q = numbers_Q < 0
        sizes = (-(-Q // 4), -(-Q // 2))
        new_tokens, burst = config.new_tokens, config.burst or BURST_OF_MANY
        for until in range(burst, new_tokens + burst, burst):
            state = self.advance(state, until, config.drawn, config.think)
            results = self.results(state)
            of_prompt = [results[first : first + k] for first in range(0, len(results), k)]
            done_QxK = np.array(state.done_B).reshape(-1, k)
            if stop is not None:
                for q in np.flatnonzero(~finished_Q):
                    done_QxK[q] |= np.asarray(stop(int(numbers_Q[q]), of_prompt[q]), bool)
                state = replace(state, done_B=jnp.asarray(done_QxK.reshape(-1)))
            for q in np.flatnonzero(~finished_Q & (done_QxK.all(1) | (until >= new_tokens))):
                finished_Q[q] = True
                yield int(numbers_Q[q]), of_prompt[q]
            if finished_Q.all():
                return
            size = next((size for size in sizes if size >= (~finished_Q).sum()), len(numbers_Q))
            if size < len(numbers_Q):  # stable: the unfinished ones, then finished ones to fill up
                remaining = np.argsort(finished_Q, kind="stable")[:size].astype(np.int32)
                state, numbers_Q, finished_Q = (
                    take_prompts(state, remaining),
                    numbers_Q[remaining],
                    finished_Q[remaining],
                )

    def warm_up(self, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> None:
        """Compiles what generating with these arguments takes, so that the next call can be timed. Draws no token.

        Parameters that are on disk stay there, see the class.

        Raises:
          InputError: as for `start`.
        """
        self.check(config)
        if self._given is None:
            jax.block_until_ready(self.advance(self.start(prompts, config), 0, config.drawn, config.think))
            return
        self._check_prompts(prompts, config.new_tokens)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._given)
        own_shapes = jax.eval_shape(functools.partial(own_params, self.decoder), shapes)
        model = (self.decoder, self._recorded, own_shapes)
        padded = self._padded(prompts, config)
        size = self._size(padded, config, self._room(prompts, config))
        state = programs.prefill(*model, padded, self.routing_key, size=size, ahead=True)
        bounds, static = self._advance_inputs(0, config.drawn, config.think)
        programs.advance_program().lower(*model, state, bounds, self.routing_key, **static).compile()
        give_back_freed_memory()


def _batch(prompts: Sequence[Sequence[int]]) -> int:
    """How many prompts a batch of these is filled up to."""
    return rounded_up(len(prompts), 1, 2 * len(prompts))


def _ended(state: DecodeState, finished: Sequence[bool]) -> jax.Array:
    """Which rows are finished when some are finished already; `finished` leaves out the rows that fill up the batch."""
    ended_B = np.ones(len(state.done_B), bool)
    ended_B[: len(finished)] = finished
    return state.done_B | jnp.asarray(ended_B)

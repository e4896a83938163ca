"""Generation: prefill the prompts once, then one `lax.while_loop` over a documented state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mod_star.config import ThinkingConfig
from mod_star.decoding.caches import Cache, RoutedCache, full_cache, routed_cache, text_of
from mod_star.decoding.sampling import Sampling, draw
from mod_star.decoding.step import decode_step, logits_of, unstack
from mod_star.decoding.think import Think, ThoughtRecord, empty_record, think_step
from mod_star.errors import InputError, require
from mod_star.model import Decoder
from mod_star.model.routing import causal_slots
from mod_star.model.transformer import block_names, group_count

PROMPT_MULTIPLE = 32
"""Prompts are padded to a multiple of this, so that few programs are compiled for prompts of many lengths."""
NEVER = Think()
THOUGHTS = np.uint32(2**32 - 1)
"""Folded into a row's key for the draws of its thoughts, so that its tokens are drawn the same without any."""


@struct.dataclass
class DecodeState:
    """Everything that changes while decoding a batch of B rows with room for T new tokens."""

    caches: tuple[Cache, ...]
    """One per block, in order."""
    hidden_BxD: jax.Array
    """Hidden state at the last token, after the final norm, in the compute type: times the LM head it gives logits."""
    tokens_BxT: jax.Array
    """int32 generated tokens; -1 where none (yet)."""
    log_probs_BxT: jax.Array
    """float32 log-probability of each generated token under the model itself (temperature 1, all tokens; after its
    thought, where the row thought)."""
    step: jax.Array
    """int32 number of tokens generated in each unfinished row."""
    done_B: jax.Array
    """bool; the row has generated an end token, or `stream` was told to end it."""
    lengths_B: jax.Array
    """int32 prompt lengths."""
    keys_B: jax.Array
    """A random key per row: what a row draws does not depend on the rows beside it."""
    record: ThoughtRecord | None = None
    """What was thought before each token; None for a model that can't think."""


@dataclass(frozen=True)
class Generated:
    """What became of one prompt."""

    tokens: list[int]
    """New tokens, without the end token."""
    log_probs: list[float]
    """Their log-probabilities in nats under the model (temperature 1, all tokens), mixed where it thought."""
    finished: bool
    """Whether it ended by itself, with an end token."""
    routed_fraction: list[float]
    """Share of prompt and new tokens that each routed block computed; empty for a dense model."""
    overflow: int
    """Times a routed block wanted a token but had no slot left, over all routed blocks. Thoughts don't count."""
    entropies: list[float] = field(default_factory=list)
    """Entropy in nats of the prediction of each token without a thought. Empty if it never thinks, as the next two."""
    thoughts: list[list[int] | None] = field(default_factory=list)
    """The thought before each token, without <start> and <end>; None where it didn't think, [] for pauses."""
    mixing_weights: list[float | None] = field(default_factory=list)
    """Weight of the prediction after the thought; None where it didn't think."""


class Generator:
    """Generates with one model. Compiles once per (batch size, padded prompt length, room, sampling, way of thinking).

    Args:
      decoder: the model.
      params: its parameters as trained (stacked).
      end_ids: tokens that end a row.
      routing_key: for models with stochastic routing.
      thinking: length and kind of thoughts, for a model that can think; `params` then has the entry "thinking".
    """

    def __init__(
        self,
        decoder: Decoder,
        params: dict[str, Any],
        end_ids: Sequence[int] = (),
        routing_key: jax.Array | None = None,
        thinking: ThinkingConfig | None = None,
    ) -> None:
        self.decoder = decoder
        self.thinking = ThinkingConfig() if thinking is None else thinking
        self._can_think = thinking is not None and "thinking" in params
        self.params = unstack(decoder, params)
        self._stacked = params
        self._end_ids = tuple(end_ids)
        self._routing_key = routing_key if decoder.routing.selection == "stochastic" else None
        self._prefill = jax.jit(self._prefill_fn, static_argnames=("room", "slots"))
        self._advance = jax.jit(self._advance_fn, static_argnames=("sampling", "think"), donate_argnames=("state",))

    def start(self, prompts: Sequence[Sequence[int]], new_tokens: int, seed: int = 0) -> DecodeState:
        """Runs the prompts and returns the state before the first new token.

        Args:
          prompts: token ids, at least one per prompt; lengths may differ.
          new_tokens: the most tokens to generate per row (T).
          seed: of the rows' random keys.

        Raises:
          InputError: a prompt is empty, holds an id that the model doesn't have, or leaves no room for `new_tokens` in
            the model's context.
        """
        self._check(prompts, new_tokens)
        context = self.decoder.config.context
        longest = max(map(len, prompts))
        padded = min(-(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE, context - new_tokens)
        tokens = np.zeros((len(prompts), padded), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(prompts)))
        lengths = jnp.array([len(prompt) for prompt in prompts], jnp.int32)
        # The slots do not depend on how prompts are padded, so neither does what is generated.
        slots = causal_slots(self.decoder.routing, context)
        return self._prefill(self._stacked, jnp.asarray(tokens), lengths, keys, room=new_tokens, slots=slots)

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
        self, params: dict[str, Any], tokens_BxP: jax.Array, lengths_B: jax.Array, keys_B: jax.Array, room: int,
        slots: int,
    ) -> DecodeState:  # fmt: skip
        B, P = tokens_BxP.shape
        segment_ids_BxP = (jnp.arange(P) < lengths_B[:, None]).astype(jnp.int32)
        positions_P = jnp.arange(P, dtype=jnp.int32)

        def run(tokens_P: jax.Array, segment_ids_P: jax.Array) -> Any:
            return self.decoder.apply(
                {"params": params}, tokens_P, positions_P, segment_ids_P, mode="causal", slots=slots,
                key=self._routing_key, keep_keys_values=True,
            )  # fmt: skip

        output = jax.vmap(run)(tokens_BxP, segment_ids_BxP)
        caches: list[Cache] = []
        for group in range(group_count(self.decoder.config, self.decoder.routing)):
            for name in block_names(self.decoder.routing):
                prompt = jax.tree.map(lambda leaf, group=group: leaf[:, group], output.keys_values[name])
                if name == "routed":
                    overflow_B = jnp.sum(output.trace.overflow[:, group], -1, dtype=jnp.int32)
                    caches.append(routed_cache(prompt, overflow_B, slots))
                else:
                    caches.append(full_cache(prompt, room))
        last_BxD = jnp.take_along_axis(output.hidden, (lengths_B - 1)[:, None, None], 1)[:, 0]
        return DecodeState(
            caches=tuple(caches),
            hidden_BxD=last_BxD,
            tokens_BxT=jnp.full((B, room), -1, jnp.int32),
            log_probs_BxT=jnp.zeros((B, room), jnp.float32),
            step=jnp.zeros((), jnp.int32),
            done_B=jnp.zeros(B, bool),
            lengths_B=lengths_B,
            keys_B=keys_B,
            record=empty_record(B, room, self.thinking) if self._can_think else None,
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
        return self._advance(self.params, state, jnp.int32(until), threshold, sampling=sampling, think=fixed)

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
            log_probs_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BxV), tokens_B[:, None], 1)[:, 0]
            ends_B = functools.reduce(jnp.logical_or, [tokens_B == i for i in self._end_ids], state.done_B)
            hidden_BxD, caches = decode_step(
                self.decoder, params, state.caches, tokens_B, state.lengths_B, state.step, ~ends_B, self._routing_key
            )

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
                step=state.step + 1,
                done_B=ends_B,
                record=state.record if thoughts is None else jax.tree.map(write, state.record, thoughts),
            )

        return jax.lax.while_loop(unfinished, one_token, state)

    def _think(
        self, params: dict[str, Any], state: DecodeState, think: Think, threshold: jax.Array | float
    ) -> tuple[jax.Array, ThoughtRecord]:
        """Logits and record of one step, see `think_step`."""
        fold = lambda key: jax.random.fold_in(jax.random.fold_in(key, THOUGHTS), state.step)  # noqa: E731
        text = text_of(self.decoder.routing, state.caches, state.lengths_B, state.step)
        return think_step(
            self.decoder, params, self.thinking, think, threshold, state.hidden_BxD, text,
            state.lengths_B + state.step - 1, jax.vmap(fold)(state.keys_B), ~state.done_B,
        )  # fmt: skip

    def results(self, state: DecodeState) -> list[Generated]:
        """What has been generated up to now, row by row."""
        tokens, log_probs, lengths = jax.device_get((state.tokens_BxT, state.log_probs_BxT, state.lengths_B))
        record = jax.device_get(state.record)
        routed = [c for c in state.caches if isinstance(c, RoutedCache)]
        counts = np.array(jax.device_get([cache.count_B for cache in routed])).reshape(len(routed), len(tokens))
        overflow = np.array(jax.device_get([cache.overflow_B for cache in routed])).reshape(len(routed), len(tokens))
        results = []
        for row in range(len(tokens)):
            new = tokens[row][tokens[row] >= 0].tolist()
            ended = bool(new) and new[-1] in self._end_ids
            seen = int(lengths[row]) + len(new) - ended
            results.append(
                Generated(
                    tokens=new[:-1] if ended else new,
                    log_probs=log_probs[row][: len(new) - ended].tolist(),
                    finished=ended,
                    routed_fraction=(counts[:, row] / seen).tolist() if routed else [],
                    overflow=int(overflow[:, row].sum()) if routed else 0,
                    **thought_of_row(record, row, len(new) - ended),
                )
            )
        return results

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        burst: int = 8,
        stop: Callable[[list[Generated]], Sequence[bool]] | None = None,
        think: Think = NEVER,
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
        """
        require(burst >= 1, "burst", burst, "must be at least 1")
        self._check_thinking(think)
        state = self.start(prompts, new_tokens, seed)
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
    ) -> list[Generated]:
        """All at once: `new_tokens` tokens per prompt, or fewer where an end token comes first."""
        self._check_thinking(think)
        return self.results(self.advance(self.start(prompts, new_tokens, seed), new_tokens, sampling, think))

    def warm_up(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling, think: Think = NEVER
    ) -> None:
        """Compiles what generating with these arguments takes, so that the next call can be timed. Draws no token."""
        self._check_thinking(think)
        jax.block_until_ready(self.advance(self.start(prompts, new_tokens), 0, sampling, think))


def thought_of_row(record: ThoughtRecord | None, row: int, count: int) -> dict[str, Any]:
    """The fields of `Generated` about the first `count` tokens of a row; `record` is of NumPy arrays."""
    if record is None or np.isnan(record.entropies_BxT).all():  # nobody was asked to think
        return {}
    entropies, thinks, thoughts, weights = (
        array[row, :count].tolist()
        for array in (record.entropies_BxT, record.thinks_BxT, record.thoughts_BxTxN, record.weights_BxT)
    )
    return {
        "entropies": entropies,
        "thoughts": [
            [token for token in tokens if token >= 0] if thought else None
            for tokens, thought in zip(thoughts, thinks, strict=True)
        ],
        "mixing_weights": [weight if thought else None for weight, thought in zip(weights, thinks, strict=True)],
    }

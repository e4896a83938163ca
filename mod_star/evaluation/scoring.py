"""Log-likelihoods of given texts: of continuations after contexts, and of long texts in windows; thinking or not.

Texts are run whole, a batch at a time in a few padded lengths. Texts that begin with one another share a pass: the
answers to a multiple-choice question cost one pass of their question where each is a single token. The LM head is
applied only where something is to be scored, `HEAD_ROWS` positions at a time, so that the logits of a text never exist
at once. A thinking model thinks before every scored token (or where it is unsure) exactly as while generating: by
`decoding.think.think_step`, on the keys/values of the text before that token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mod_star.config import ThinkingConfig
from mod_star.decoding.generate import NEVER
from mod_star.decoding.step import unstack
from mod_star.decoding.think import Think, think_step
from mod_star.errors import InputError, require
from mod_star.model import Decoder
from mod_star.model.routing import causal_slots
from mod_star.model.transformer import block_names, group_count, logits_of

Pair = tuple[Sequence[int], Sequence[int]]

HEAD_ROWS = 64
"""Positions whose logits exist at one time."""
THOUGHT_ROWS = 32
"""Thoughts that are computed side by side at the most: enough for the weights to be read seldom."""
THOUGHT_BYTES = 2**28
"""Bytes of text keys/values that such thoughts may have copied for them; fewer think at once where texts are long."""


@dataclass(frozen=True)
class Scored:
    """What a model says of one continuation, per token."""

    log_probs: list[float]
    """Log-probability in nats (temperature 1, all tokens), mixed where the model thought."""
    is_greedy: list[bool]
    """Whether the token is the most probable one."""
    restricted_log_probs: list[float] | None = None
    """The same as `log_probs`, renormalised over the allowed ids; -inf for tokens that are none. None if not asked."""
    restricted_is_greedy: list[bool] | None = None
    """Whether the token is the most probable of the allowed ones; None if not asked."""
    thought: list[bool] = field(default_factory=list)
    """Whether the model thought before it; empty if it wasn't asked to."""


def score(
    decoder: Decoder,
    params: dict[str, Any],
    pairs: Sequence[Pair],
    *,
    allowed_ids: Sequence[int] | None = None,
    thinking: ThinkingConfig | None = None,
    think: Think = NEVER,
    batch_size: int = 8,
    truncate: bool = False,
    seed: int = 0,
    routing_key: jax.Array | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Scored]:
    """Log-probabilities of the tokens of each continuation after its context, routed causally in a MoD model.

    Args:
      decoder: the model.
      params: its parameters as trained (stacked).
      pairs: token ids of context and continuation; a context has at least one token (bos, where there is nothing else).
      allowed_ids: ids to renormalise the probabilities over, besides (the evaluation of Quiet-STaR).
      thinking: length and kind of thoughts, for a model that can think; `params` then has the entry "thinking".
      think: when to think before a scored token, and how. Never while reading the context.
      batch_size: texts at a time; changes speed and memory, not the result.
      truncate: drop the beginning of contexts that are too long, instead of refusing them.
      seed: of thoughts' draws; greedy ones don't depend on it.
      routing_key: for models with stochastic routing.
      progress: called with the number of pairs that are done, and of all, after every batch.

    Returns:
      One result per pair, in their order.

    Raises:
      InputError: a context is empty, a pair doesn't fit into the model's context, an id is none of the model's, or the
        model is asked to think and can't.
    """
    found = score_stream(
        decoder, params, pairs, allowed_ids=allowed_ids, thinking=thinking, think=think, batch_size=batch_size,
        truncate=truncate, seed=seed, routing_key=routing_key, progress=progress,
    )  # fmt: skip
    results = dict(found)
    return [results[index] for index in range(len(pairs))]


def score_stream(
    decoder: Decoder,
    params: dict[str, Any],
    pairs: Sequence[Pair],
    *,
    allowed_ids: Sequence[int] | None = None,
    thinking: ThinkingConfig | None = None,
    think: Think = NEVER,
    batch_size: int = 8,
    truncate: bool = False,
    seed: int = 0,
    routing_key: jax.Array | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Scored]]:
    """`score`, batch by batch: yields (index of the pair, result) as they come, long texts first."""
    require(batch_size >= 1, "batch_size", batch_size, "must be at least 1")
    can_think = thinking is not None and "thinking" in params
    thinks = think.when != "never"
    require(can_think or not thinks, "think.when", think.when, "must be never, the model has not learned to think")
    allowed = None if allowed_ids is None else _checked_ids(allowed_ids, decoder.config.vocab_size)
    texts = _texts(decoder, pairs, truncate)
    return _stream(
        decoder, params, texts, len(pairs), batch_size, allowed, thinking if thinks else None, think, seed,
        _routing_key(decoder, routing_key), progress,
    )  # fmt: skip


def rolling_windows(tokens: Sequence[int], first: int, window: int, overlap: int = 1) -> list[Pair]:
    """A long text as pairs that score each of its tokens once.

    Args:
      tokens: ids of the text.
      first: id that the first token is predicted from, such as bos.
      window: most tokens that the model reads at a time, at the most its context.
      overlap: tokens before it that a token sees at least, those at the text's beginning apart; 1 to `window`.
        1: windows side by side, the least work.

    Returns:
      (context, continuation); after the first window, contexts are as long as `window` allows.
    """
    require(window >= 1, "window", window, "must be at least 1")
    require(1 <= overlap <= window, "overlap", overlap, f"must lie in [1, {window}], the window")
    whole = [first, *tokens]
    pairs: list[Pair] = []
    end = 1  # of what has been scored, in `whole`
    while end < len(whole):
        start = end
        end = min(len(whole), start + (window if start == 1 else window - overlap + 1))
        pairs.append((whole[max(0, end - 1 - window) : start], whole[start:end]))
    return pairs


def score_rolling(
    decoder: Decoder,
    params: dict[str, Any],
    texts: Sequence[Sequence[int]],
    first: int,
    *,
    window: int | None = None,
    overlap: int = 1,
    **options: Any,
) -> list[Scored]:
    """Log-probabilities of all tokens of long texts, in windows.

    Args:
      decoder: the model.
      params: its parameters as trained (stacked).
      texts: token ids, any number.
      first: id that a text's first token is predicted from, such as bos.
      window: most tokens that the model reads at a time; its context by default.
      overlap: tokens before it that a token sees at least, see `rolling_windows`.
      **options: those of `score`.

    Returns:
      One result per text, one entry per token.
    """
    window = decoder.config.context if window is None else window
    allowed = f"must be at most {decoder.config.context}, the model's context"
    require(window <= decoder.config.context, "window", window, allowed)
    windows = [rolling_windows(text, first, window, overlap) for text in texts]
    scored = iter(score(decoder, params, [pair for each in windows for pair in each], **options))
    return [_joined([next(scored) for _ in each], options.get("allowed_ids") is not None) for each in windows]


def _joined(parts: list[Scored], restricted: bool) -> Scored:
    """The windows of one text as one."""
    names = [name for name in Scored.__dataclass_fields__ if restricted or not name.startswith("restricted")]
    return Scored(**{name: [value for part in parts for value in getattr(part, name)] for name in names})


@dataclass(frozen=True)
class _Text:
    """A text to run, with the pairs that it serves: their inputs are beginnings of it."""

    tokens: tuple[int, ...]
    pairs: list[tuple[int, int, Sequence[int]]]
    """Index of the pair, position that its first token is predicted at, the tokens to score."""


def _texts(decoder: Decoder, pairs: Sequence[Pair], truncate: bool) -> list[_Text]:
    """What has to be run, the longest first. What is scored last is predicted, and needs not be run itself."""
    context, V = decoder.config.context, decoder.config.vocab_size
    inputs: dict[tuple[int, ...], list[tuple[int, int, Sequence[int]]]] = {}
    for index, (before, after) in enumerate(pairs):
        if len(before) < 1 or len(after) < 1:
            raise InputError(
                f"pair {index + 1} = {len(before)} + {len(after)} tokens: context and continuation must have at least 1"
            )
        fits = context + 1 - len(after)
        if fits < 1 or (len(before) > fits and not truncate):
            raise InputError(
                f"pair {index + 1} = {len(before)} + {len(after)} tokens: must be at most {context + 1} "
                f"(context {context}, and the last token is not read)"
            )
        before = before[max(0, len(before) - fits) :]
        whole = (*before, *after)
        if not 0 <= min(whole) <= max(whole) < V:
            raise InputError(f"pair {index + 1}: token ids must lie in [0, {V}), has {min(whole)} to {max(whole)}")
        inputs.setdefault(whole[:-1], []).append((index, len(before) - 1, after))
    texts: list[_Text] = []
    # In descending order a text comes right before its beginnings, or before others that begin with them too.
    for tokens in sorted(inputs, reverse=True):
        if texts and texts[-1].tokens[: len(tokens)] == tokens:
            texts[-1].pairs.extend(inputs[tokens])
        else:
            texts.append(_Text(tokens, inputs[tokens]))
    return sorted(texts, key=lambda text: len(text.tokens), reverse=True)


def _checked_ids(ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.int32]:
    unique = sorted(set(ids))
    fine = bool(unique) and unique[0] >= 0 and unique[-1] < vocab_size
    require(fine, "allowed_ids", list(ids), f"must be at least one id in [0, {vocab_size})")
    return np.asarray(unique, np.int32)


def _routing_key(decoder: Decoder, key: jax.Array | None) -> jax.Array | None:
    if decoder.routing.selection == "learned" or decoder.routing.every == 0:
        return None
    return jax.random.key(0) if key is None else key


def padded_length(tokens: int, context: int, steps: int = 8) -> int:
    """Length that a text is padded to, so that few programs are compiled for texts of all lengths.

    A multiple of 1 / steps of the next power of two, but at least of 32: with 8 steps at most a quarter is padding.
    """
    step = max(32, (1 << (tokens - 1).bit_length()) // steps)
    return min(-(-tokens // step) * step, context)


def _stream(
    decoder: Decoder,
    params: dict[str, Any],
    texts: list[_Text],
    count: int,
    batch_size: int,
    allowed: npt.NDArray[np.int32] | None,
    thinking: ThinkingConfig | None,
    think: Think,
    seed: int,
    routing_key: jax.Array | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, Scored]]:
    # A thought runs token by token: there, slicing stacked weights at every step would copy them.
    groups = unstack(decoder, params)["groups"] if thinking is not None else None
    threshold = jnp.float32(think.threshold or 0.0)
    fixed = replace(think, threshold=0.0) if think.when == "auto" else think  # a new threshold is no new program
    batch_size = min(batch_size, len(texts))
    starts = range(0, len(texts), max(1, batch_size))
    plans = [_plan(texts[start : start + batch_size]) for start in starts]
    most = max((len(plan) for plan in plans), default=0)
    rows = HEAD_ROWS if thinking is None else min(-(-most // 8) * 8, THOUGHT_ROWS)
    # Thinking takes long to compile, the text is the smaller part of its work: fewer programs, more padding.
    steps = 8 if thinking is None else 1
    done = 0
    for start, plan in zip(starts, plans, strict=True):
        batch = texts[start : start + batch_size]
        S = padded_length(len(batch[0].tokens), decoder.config.context, steps)
        tokens, lengths = np.zeros((batch_size, S), np.int32), np.ones(batch_size, np.int32)
        for row, text in enumerate(batch):
            tokens[row, : len(text.tokens)], lengths[row] = text.tokens, len(text.tokens)
        width = max(len(targets) for targets in plan.values())
        width = 1 << (width - 1).bit_length()
        N = batch_size * S
        where, targets = np.zeros((N, 2), np.int32), np.zeros((N, width), np.int32)
        slots: dict[tuple[int, int], int] = {}
        for slot, ((row, position), wanted) in enumerate(plan.items()):
            slots[row, position] = slot
            where[slot], targets[slot, : len(wanted)] = (row, position), list(wanted)
        found = _score_batch(
            decoder, thinking, fixed, rows, params, groups, tokens, lengths, where, targets, np.int32(len(plan)),
            allowed, threshold, seed, np.int32(start), routing_key,
        )  # fmt: skip
        log_probs, greedy, restricted, restricted_greedy, thinks = jax.device_get(found)
        for row, text in enumerate(batch):
            for index, position, after in text.pairs:
                at = [slots[row, position + i] for i in range(len(after))]
                columns = [plan[row, position + i][token] for i, token in enumerate(after)]
                yield (
                    index,
                    Scored(
                        log_probs[at, columns].tolist(),
                        greedy[at, columns].tolist(),
                        None if allowed is None else restricted[at, columns].tolist(),
                        None if allowed is None else restricted_greedy[at, columns].tolist(),
                        [] if thinking is None else thinks[at].tolist(),
                    ),
                )
        done += sum(len(text.pairs) for text in batch)
        if progress is not None:
            progress(done, count)


def _plan(batch: list[_Text]) -> dict[tuple[int, int], dict[int, int]]:
    """(row, position) -> the tokens to score there -> their columns."""
    plan: dict[tuple[int, int], dict[int, int]] = {}
    for row, text in enumerate(batch):
        for _, position, after in text.pairs:
            for offset, token in enumerate(after):
                columns = plan.setdefault((row, position + offset), {})
                columns.setdefault(token, len(columns))
    return plan


@functools.partial(jax.jit, static_argnames=("decoder", "thinking", "think", "rows"))
def _score_batch(
    decoder: Decoder,
    thinking: ThinkingConfig | None,
    think: Think,
    rows: int,
    params: dict[str, Any],
    groups: Any,
    tokens_BxS: jax.Array,
    lengths_B: jax.Array,
    where_Nx2: jax.Array,
    targets_NxT: jax.Array,
    count: jax.Array,
    allowed_A: jax.Array | None,
    threshold: jax.Array,
    seed: jax.Array,
    first_row: jax.Array,
    routing_key: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Runs a batch and scores `count` places of it; what lies behind them in the results means nothing.

    Args:
      decoder: the model.
      thinking: None: don't think.
      think: when and how; its threshold is in `threshold`.
      rows: places that are computed at a time, or fewer.
      params: stacked.
      groups: the same parameters of the blocks, unrolled; None without thinking.
      tokens_BxS: int32 texts, padded.
      lengths_B: int32 lengths.
      where_Nx2: int32 (row, position) whose next token is scored.
      targets_NxT: int32 tokens to score there.
      count: int32 places; the rest of N is padding.
      allowed_A: int32 ids to renormalise over, or None.
      threshold: float32 scalar, of `think`.
      seed: int32, of thoughts' draws.
      first_row: int32 number of the first text.
      routing_key: of stochastic routing, or None.

    Returns:
      Float32 log-probabilities NxT, bool NxT whether greedy, the same two renormalised, bool N whether it thought.
    """
    (S, N, T), context = (tokens_BxS.shape[1], *targets_NxT.shape), decoder.config.context
    segment_ids_BxS = (jnp.arange(S) < lengths_B[:, None]).astype(jnp.int32)
    slots = causal_slots(decoder.routing, context)  # as in generation, however the texts are padded

    def run(tokens_S: jax.Array, segment_ids_S: jax.Array) -> Any:
        return decoder.apply(
            {"params": params}, tokens_S, None, segment_ids_S, mode="causal", slots=slots, key=routing_key,
            keep_keys_values=thinking is not None,
        )  # fmt: skip

    output = jax.vmap(run)(tokens_BxS, segment_ids_BxS)
    R = rows if thinking is None else max(1, min(rows, THOUGHT_BYTES // _bytes_of_one(output.keys_values)))
    pad = lambda a: jnp.pad(a, [(0, -N % R), *[(0, 0)] * (a.ndim - 1)])  # noqa: E731
    where_Nx2, targets_NxT = pad(where_Nx2), pad(targets_NxT)

    def portion(i: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i * R, R)  # noqa: E731
        (row_R, position_R), targets_RxT = cut(where_Nx2).T, cut(targets_NxT)
        active_R = i * R + jnp.arange(R) < count
        hidden_RxD = output.hidden[row_R, position_R]
        if thinking is None:
            logits_RxV, thinks_R = logits_of(params, hidden_RxD), jnp.zeros(R, bool)
        else:
            text = _texts_of_rows(decoder, output.keys_values, row_R)
            fold = lambda row, at: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), at)  # noqa: E731
            logits_RxV, record = think_step(
                decoder, {**params, "groups": groups}, thinking, think, threshold, hidden_RxD, text, position_R,
                jax.vmap(fold)(first_row + row_R, position_R), active_R,
            )  # fmt: skip
            thinks_R = record.thinks_BxT
        log_p_RxV = jax.nn.log_softmax(logits_RxV)
        log_probs_RxT = jnp.take_along_axis(log_p_RxV, targets_RxT, 1)
        greedy_RxT = jnp.argmax(logits_RxV, -1)[:, None] == targets_RxT
        restricted_RxT, best_RxT = log_probs_RxT, greedy_RxT
        if allowed_A is not None:
            log_p_RxA = log_p_RxV[:, allowed_A]
            is_allowed = jnp.any(targets_RxT[..., None] == allowed_A, -1)
            total_Rx1 = jax.nn.logsumexp(log_p_RxA, -1, keepdims=True)
            restricted_RxT = jnp.where(is_allowed, log_probs_RxT - total_Rx1, -jnp.inf)
            best_RxT = allowed_A[jnp.argmax(log_p_RxA, -1)][:, None] == targets_RxT
        new = (log_probs_RxT, greedy_RxT, restricted_RxT, best_RxT, thinks_R)
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, i * R, 0)  # noqa: E731
        return jax.tree.map(put, results, new)

    M = where_Nx2.shape[0]
    numbers, flags = jnp.zeros((M, T)), jnp.zeros((M, T), bool)
    empty = (numbers, flags, numbers, flags, jnp.zeros(M, bool))
    return jax.lax.fori_loop(0, (count + R - 1) // R, portion, empty)


def _bytes_of_one(keys_values: Any) -> int:
    """Bytes of the keys/values of one text of a batch."""
    return sum(leaf.size * leaf.dtype.itemsize // leaf.shape[0] for leaf in jax.tree.leaves(keys_values))


def _texts_of_rows(decoder: Decoder, keys_values: Any, row_R: jax.Array) -> tuple[Any, Any]:
    """The texts' keys/values for R thoughts, as `decoding.caches.text_of` gives them: nothing generated, all prompt."""
    names, groups = block_names(decoder.routing), range(group_count(decoder.config, decoder.routing))
    pick = lambda segment, group: jax.tree.map(lambda leaf: leaf[row_R, group], segment)  # noqa: E731
    own = tuple(dict.fromkeys(names, ()) for _ in groups)
    return own, tuple({name: (pick(keys_values[name], group),) for name in names} for group in groups)

"""Log-likelihoods of given texts: of continuations after contexts, and of long texts in windows; thinking or not.

Texts are run whole, a batch at a time in a few padded lengths. Texts that begin with one another share a pass: the
answers to a multiple-choice question cost one pass of their question where each is a single token. Here it is decided
what is run and what is read from it; what a batch computes is `score_batch`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from mod_star.config import ThinkingConfig
from mod_star.decoding.generate import NEVER
from mod_star.decoding.lengths import PROMPT, rounded_up
from mod_star.decoding.step import unstack
from mod_star.decoding.think import Think
from mod_star.distributed.sharding import batch_sharding, use_mesh
from mod_star.errors import InputError, require
from mod_star.evaluation.score_batch import HEAD_ROWS, THOUGHT_ROWS, score_batch
from mod_star.model import Decoder

Pair = tuple[Sequence[int], Sequence[int]]
MANY_BATCHES = 32
"""From which on less padding is worth more programs."""


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
    mesh: Mesh | None = None,
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
      batch_size: texts at a time, a multiple of the mesh's shares; changes speed and memory, not the result.
      truncate: drop the beginning of contexts that are too long, instead of refusing them.
      seed: of thoughts' draws, which else depend on the text before them alone; greedy ones don't depend on it.
      routing_key: for models with stochastic routing.
      mesh: where `params` lie, if on several devices. Texts are shared out over data and fsdp.
      progress: called with the number of pairs that are done, and of all, after every batch.

    Returns:
      One result per pair, in their order.

    Raises:
      InputError: a context is empty, a pair doesn't fit into the model's context, an id is none of the model's, the
        model is asked to think and can't, or the mesh can't share out batches of that size.
    """
    found = score_stream(
        decoder, params, pairs, allowed_ids=allowed_ids, thinking=thinking, think=think, batch_size=batch_size,
        truncate=truncate, seed=seed, routing_key=routing_key, mesh=mesh, progress=progress,
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
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Scored]]:
    """`score`, batch by batch: yields (index of the pair, result) as they come, long texts first."""
    require(batch_size >= 1, "batch_size", batch_size, "must be at least 1")
    require_shareable("batch_size", batch_size, mesh)
    can_think = thinking is not None and "thinking" in params
    thinks = think.when != "never"
    require(can_think or not thinks, "think.when", think.when, "must be never, the model has not learned to think")
    allowed = None if allowed_ids is None else _checked_ids(allowed_ids, decoder.config.vocab_size)
    texts = _texts(decoder, pairs, truncate)
    return _stream(
        decoder, params, texts, len(pairs), batch_size, allowed, thinking if thinks else None, think, seed,
        _routing_key(decoder, routing_key), mesh, progress,
    )  # fmt: skip


def shares_of(mesh: Mesh | None) -> int:
    """How many shares a mesh cuts a batch into; 1 without a mesh."""
    return 1 if mesh is None else int(mesh.shape["data"] * mesh.shape["fsdp"])


def require_shareable(option: str, batch_size: int, mesh: Mesh | None) -> None:
    """Raises InputError, with the numbers, unless every share of the mesh gets as many rows of a batch as the others.

    Args:
      option: what the user calls the batch size.
      batch_size: rows.
      mesh: None: a single device, which takes any number.
    """
    if mesh is not None and batch_size % shares_of(mesh):
        sizes = f"{mesh.shape['data']} x {mesh.shape['fsdp']} = {shares_of(mesh)}"
        require(False, option, batch_size, f"must be a multiple of mesh.data x mesh.fsdp = {sizes}")


def rolling_windows(tokens: Sequence[int], first: int, window: int, overlap: int = 1) -> list[Pair]:
    """A long text as pairs that score each of its tokens once.

    Args:
      tokens: ids of the text.
      first: id that the first token is predicted from, such as bos.
      window: most tokens that the model reads at a time, at most its context.
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
    """Length that a text is padded to where many batches follow: with 8 steps at most a quarter is padding.

    A multiple of 1 / steps of the next power of two, but at least of 32. For few batches, `lengths.rounded_up` needs
    fewer programs.
    """
    step = max(32, (1 << (tokens - 1).bit_length()) // steps)
    return min(-(-tokens // step) * step, context)


def _few_lengths(tokens: int, context: int) -> int:
    return rounded_up(tokens, PROMPT, context)


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
    mesh: Mesh | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, Scored]]:
    # A thought runs token by token: there, slicing stacked weights at every step would copy them.
    groups = unstack(decoder, params)["groups"] if thinking is not None else None
    threshold = jnp.float32(think.threshold or 0.0)
    fixed = replace(think, threshold=0.0) if think.when == "auto" else think  # a new threshold is no new program
    shares = shares_of(mesh)
    enough = rounded_up(max(1, len(texts)), 1, 2 * len(texts) + 1)
    batch_size = min(batch_size, -(-enough // shares) * shares)
    starts = range(0, len(texts), batch_size)
    plans = [_plan(texts[start : start + batch_size]) for start in starts]
    most = max((len(plan) for plan in plans), default=0)
    rows = HEAD_ROWS if thinking is None else min(-(-most // (8 * shares)) * 8, THOUGHT_ROWS)
    context = decoder.config.context
    done = 0
    for start, plan in zip(starts, plans, strict=True):
        batch = texts[start : start + batch_size]
        longest = len(batch[0].tokens)
        if thinking is not None:  # takes long to compile, and the text is the smaller part of its work
            S = padded_length(max(longest, min(PROMPT, context)), context, 1)
        else:
            S = (padded_length if len(starts) >= MANY_BATCHES else _few_lengths)(longest, context)
        tokens, lengths = np.zeros((batch_size, S), np.int32), np.ones(batch_size, np.int32)
        for row, text in enumerate(batch):
            tokens[row, : len(text.tokens)], lengths[row] = text.tokens, len(text.tokens)
        width = max(len(targets) for targets in plan.values())
        width = 1 << (width - 1).bit_length()
        N = batch_size * S
        where, targets = np.zeros((N, 2), np.int32), np.zeros((N, width), np.int32)
        draws = np.zeros(N, np.uint32)
        slots: dict[tuple[int, int], int] = {}
        for slot, ((row, position), wanted) in enumerate(plan.items()):
            slots[row, position] = slot
            where[slot], targets[slot, : len(wanted)] = (row, position), list(wanted)
            draws[slot] = zlib.crc32(tokens[row, : position + 1].tobytes())
        inputs = (tokens, lengths) if mesh is None else jax.device_put((tokens, lengths), batch_sharding(mesh))
        with use_mesh(mesh):
            found = score_batch(
                decoder, thinking, fixed, rows, params, groups, *inputs, where, targets, np.int32(len(plan)),
                allowed, threshold, seed, draws, routing_key,
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

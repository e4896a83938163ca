"""Log-likelihoods of given texts: of continuations after prefixes, and of long texts in windows; thinking or not.

Texts are run whole, a batch at a time in a few padded lengths. Texts that begin with one another share a pass: the
answers to a multiple-choice question cost one pass of their question where each is a single token. Here it is decided
what is run and what is read from it; what a batch computes is `score_batch`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from mod_star.decoding.lengths import PROMPT, rounded_up
from mod_star.decoding.step import unstack
from mod_star.decoding.think import NEVER, Think
from mod_star.distributed.sharding import batch_sharding, use_mesh
from mod_star.errors import InputError, require
from mod_star.evaluation.score_batch import HEAD_ROWS, THOUGHT_ROWS, ScoreNumbers, TextBatch, score_batch
from mod_star.loaded_model import Model
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
    overflow: int = 0
    """Times that a token of the text, its prefix and others with the same beginning included, passed by because a
    routed block had no slot left."""


@dataclass(frozen=True)
class ScoringConfig:
    """How texts are scored."""

    think: Think = NEVER
    """When to think before a scored token, and how. Never while reading the prefix."""
    batch_size: int = 8
    """Texts at a time, a multiple of the mesh's shares; changes speed and memory, not the result; unless texts share
    the slots of routed blocks (`Decoder.budget_over`), and these are all taken."""
    seed: int = 0
    """Of thoughts' draws, which else depend on the text before them alone; greedy ones don't depend on it."""
    allowed_ids: Sequence[int] | None = None
    """Ids to renormalise the probabilities over, besides (the evaluation of Quiet-STaR)."""
    truncate: bool = False
    """Drop the beginning of prefixes that are too long, instead of refusing them."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")


DEFAULT = ScoringConfig()
Progress = Callable[[int, int], None]
"""Is told how many pairs are done, and of how many, after every batch."""


def score(
    model: Model, pairs: Sequence[Pair], config: ScoringConfig = DEFAULT, progress: Progress | None = None
) -> list[Scored]:
    """Log-probabilities of the tokens of each continuation after its prefix, routed causally in a MoD model.

    Args:
      model: what scores. On a mesh, texts are shared out over data and fsdp.
      pairs: token ids of prefix and continuation; a prefix has at least one token (bos, where there is nothing else).
      config: how.
      progress: called after every batch.

    Returns:
      One result per pair, in their order.

    Raises:
      InputError: a prefix is empty, a pair doesn't fit into the model's context, an id is not one of the model's, the
        model is asked to think and can't, or the mesh can't share out batches of that size; a batch shares the slots
        of routed blocks, and the model is to think or lies on several devices.
    """
    results = dict(score_stream(model, pairs, config, progress))
    return [results[index] for index in range(len(pairs))]


def score_stream(
    model: Model, pairs: Sequence[Pair], config: ScoringConfig = DEFAULT, progress: Progress | None = None
) -> Iterator[tuple[int, Scored]]:
    """`score`, batch by batch: yields (index of the pair, result) as they come, long texts first."""
    require_shareable("batch_size", config.batch_size, model.mesh)
    possible = model.can_think or config.think.when == "never"
    require(possible, "think.when", config.think.when, "must be never: the model has not learned to think")
    if model.decoder.budget_over == "batch":
        _require_poolable(model, config)
    ids, vocab_size = config.allowed_ids, model.decoder.config.vocab_size
    allowed = None if ids is None else _checked_ids(ids, vocab_size)
    texts = _texts(model.decoder, pairs, config.truncate)
    return _stream(model, texts, config, allowed, progress)


def _require_poolable(model: Model, config: ScoringConfig) -> None:
    """Raises InputError if the texts of a batch cannot share the slots of routed blocks."""
    allowed = "must be never with budget_over = 'batch'"
    require(config.think.when == "never", "think.when", config.think.when, allowed)
    allowed = "must be sequence on several devices, each of which has sequences of its own"
    require(model.mesh is None, "budget_over", "batch", allowed)


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
      (prefix, continuation); after the first window, prefixes are as long as `window` allows.
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
    model: Model,
    texts: Sequence[Sequence[int]],
    first: int,
    config: ScoringConfig = DEFAULT,
    *,
    window: int | None = None,
    overlap: int = 1,
    progress: Progress | None = None,
) -> list[Scored]:
    """Log-probabilities of all tokens of long texts, in windows.

    Args:
      model: what scores.
      texts: token ids, any number.
      first: id that a text's first token is predicted from, such as bos.
      config: how.
      window: most tokens that the model reads at a time; its context by default.
      overlap: tokens before it that a token sees at least, see `rolling_windows`.
      progress: called after every batch, with numbers of windows.

    Returns:
      One result per text, one entry per token.
    """
    context = model.decoder.config.context
    window = context if window is None else window
    require(window <= context, "window", window, f"must be at most {context}, the model's context")
    windows = [rolling_windows(text, first, window, overlap) for text in texts]
    scored = iter(score(model, [pair for each in windows for pair in each], config, progress))
    return [_joined([next(scored) for _ in each], config.allowed_ids is not None) for each in windows]


def _joined(parts: list[Scored], restricted: bool) -> Scored:
    """The windows of one text as one."""
    names = [name for name in Scored.__dataclass_fields__ if restricted or not name.startswith("restricted")]
    lists = {name: [value for part in parts for value in getattr(part, name)] for name in names if name != "overflow"}
    return Scored(**lists, overflow=sum(part.overflow for part in parts))


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
                f"pair {index + 1} = {len(before)} + {len(after)} tokens: prefix and continuation must have at least 1"
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
    model: Model,
    texts: list[_Text],
    config: ScoringConfig,
    allowed: npt.NDArray[np.int32] | None,
    progress: Progress | None,
) -> Iterator[tuple[int, Scored]]:
    decoder, think, shares = model.decoder, config.think, shares_of(model.mesh)
    thinking = model.thinking if think.when != "never" else None
    # A thought runs token by token: there, slicing stacked weights at every step would copy them.
    groups = unstack(decoder, model.params)["groups"] if thinking is not None else None
    threshold = jnp.float32(think.threshold or 0.0)
    fixed = replace(think, threshold=0.0) if think.when == "auto" else think  # a new threshold is no new program
    numbers = ScoreNumbers(allowed, threshold, config.seed, model.routing_key_in_force)
    enough = rounded_up(max(1, len(texts)), 1, 2 * len(texts) + 1)
    batch_size = min(config.batch_size, -(-enough // shares) * shares)
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    plans = [_plan(batch) for batch in batches]
    most = max((len(plan) for plan in plans), default=0)
    rows = HEAD_ROWS if thinking is None else min(-(-most // (8 * shares)) * 8, THOUGHT_ROWS)
    context, total = decoder.config.context, sum(len(text.pairs) for text in texts)
    done = 0
    for batch, plan in zip(batches, plans, strict=True):
        longest = len(batch[0].tokens)
        if thinking is not None:  # takes long to compile, and the text is the smaller part of its work
            S = padded_length(max(longest, min(PROMPT, context)), context, 1)
        else:
            S = (padded_length if len(batches) >= MANY_BATCHES else _few_lengths)(longest, context)
        inputs, slots = _inputs(batch, plan, batch_size, S)
        if model.mesh is not None:
            shared = jax.device_put((inputs.tokens_BxS, inputs.lengths_B), batch_sharding(model.mesh))
            inputs = replace(inputs, tokens_BxS=shared[0], lengths_B=shared[1])
        with use_mesh(model.mesh):
            outputs = score_batch(decoder, thinking, fixed, rows, model.params, groups, inputs, numbers)
        log_probs, greedy, restricted, restricted_greedy, thinks, overflow_B = jax.device_get(outputs)
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
                        int(overflow_B[row]),
                    ),
                )
        done += sum(len(text.pairs) for text in batch)
        if progress is not None:
            progress(done, total)


def _inputs(
    batch: list[_Text], plan: dict[tuple[int, int], dict[int, int]], batch_size: int, S: int
) -> tuple[TextBatch, dict[tuple[int, int], int]]:
    """The texts of a batch, padded, and the places to score; and the index of each (row, position) among these."""
    # Rows that fill the batch up have no token, and so no share of a budget that the batch shares.
    tokens, lengths = np.zeros((batch_size, S), np.int32), np.zeros(batch_size, np.int32)
    for row, text in enumerate(batch):
        tokens[row, : len(text.tokens)], lengths[row] = text.tokens, len(text.tokens)
    width = max(len(targets) for targets in plan.values())
    width = 1 << (width - 1).bit_length()
    N = batch_size * S
    where, targets = np.zeros((N, 2), np.int32), np.zeros((N, width), np.int32)
    draws = np.zeros(N, np.uint32)
    slots: dict[tuple[int, int], int] = {}
    for slot, ((row, position), columns) in enumerate(plan.items()):
        slots[row, position] = slot
        where[slot], targets[slot, : len(columns)] = (row, position), list(columns)
        draws[slot] = zlib.crc32(tokens[row, : position + 1].tobytes())
    return TextBatch(tokens, lengths, where, targets, draws, np.int32(len(plan))), slots


def _plan(batch: list[_Text]) -> dict[tuple[int, int], dict[int, int]]:
    """(row, position) -> the tokens to score there -> their columns."""
    plan: dict[tuple[int, int], dict[int, int]] = {}
    for row, text in enumerate(batch):
        for _, position, after in text.pairs:
            for offset, token in enumerate(after):
                columns = plan.setdefault((row, position + offset), {})
                columns.setdefault(token, len(columns))
    return plan

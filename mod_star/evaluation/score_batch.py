"""The compiled program of `scoring`: runs a batch of texts whole and scores some of their places, thinking or not.

The LM head is applied only where something is to be scored, `HEAD_ROWS` positions at a time, so that the logits of a
text never exist at once. A thinking model thinks before every scored token (or where it is unsure) exactly as while
generating: by `decoding.think.think_step`, on the keys/values of the text before that token. On a mesh the texts are
shared out over data and fsdp, and so are the places, wherever their texts lie.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.config import ThinkingConfig
from mod_star.decoding.think import LastTokens, Think, think_step
from mod_star.distributed.sharding import BATCH_AXES, axis_size, batch_vmap, constrain
from mod_star.model import Decoder
from mod_star.model.layers import lookup
from mod_star.model.routing import RoutingCall, Tokens, causal_slots
from mod_star.model.transformer import (
    UnstackedParams,
    apply_blocks,
    block_names,
    group_count,
    head_matrix,
    logits_of,
)

HEAD_ROWS = 64
"""Positions whose logits exist at one time, for each share of a batch."""
THOUGHT_ROWS = 32
"""The most thoughts that are computed side by side: enough for the weights to be read seldom. For each share."""
THOUGHT_BYTES = 2**28
"""Bytes of text keys/values that such thoughts may have copied for them; fewer think at once where texts are long."""


@struct.dataclass
class TextBatch:
    """A batch of texts, and the places in them that are scored. N and S are padded; arrays of NumPy outside of jit."""

    tokens_BxS: Any
    """int32 texts."""
    lengths_B: Any
    """int32 lengths."""
    where_Nx2: Any
    """int32 (row, position) whose next token is scored."""
    targets_NxT: Any
    """int32 tokens to score there."""
    draws_N: Any
    """uint32, what the draws of each place's thought depend on besides the seed: the text before it, hashed."""
    count: Any
    """int32 places; the rest of N is padding."""


@struct.dataclass
class ScoreNumbers:
    """What all batches of a scoring are told as data."""

    allowed_A: Any
    """int32 ids to renormalise over, or None."""
    threshold: Any
    """float32 scalar, in place of `Think.threshold`."""
    seed: Any
    """int32, of thoughts' draws."""
    routing_key: jax.Array | None
    """Of stochastic routing, or None."""


@functools.partial(jax.jit, static_argnames=("decoder", "thinking", "think", "rows"))
def score_batch(
    decoder: Decoder,
    thinking: ThinkingConfig | None,
    think: Think,
    rows: int,
    params: dict[str, Any],
    groups: Any,
    batch: TextBatch,
    numbers: ScoreNumbers,
) -> tuple[jax.Array, ...]:
    """Runs a batch and scores its places; what lies after the last of them in the results means nothing.

    Args:
      decoder: the model.
      thinking: None: don't think.
      think: when and how; its threshold is in `numbers`.
      rows: places that are computed at a time, or fewer; for each share, where a mesh shares the batch out.
      params: stacked.
      groups: the same parameters of the blocks, unrolled; None without thinking.
      batch: the texts and places.
      numbers: everything else that is data.

    Returns:
      Float32 log-probabilities NxT, bool NxT whether greedy, the same two renormalised, bool N whether it thought; and
      int32 B, how often a routed block had no slot left for a token of a text.
    """
    tokens_BxS, lengths_B, count = batch.tokens_BxS, batch.lengths_B, batch.count
    where_Nx2, targets_NxT, draws_N, allowed_A = batch.where_Nx2, batch.targets_NxT, batch.draws_N, numbers.allowed_A
    S, (N, T), context = tokens_BxS.shape[1], targets_NxT.shape, decoder.config.context
    segment_ids_BxS = (jnp.arange(S, dtype=jnp.int32) < lengths_B[:, None]).astype(jnp.int32)
    slots = causal_slots(decoder.routing, context)  # as in generation, however the texts are padded

    def forward(tokens_S: jax.Array, segment_ids_S: jax.Array) -> Any:
        x_SxD = lookup(params["embedding"], tokens_S).astype(decoder.config.dtype)
        tokens = Tokens(x_SxD, jnp.arange(S, dtype=jnp.int32), segment_ids_S)
        call = RoutingCall(slots=slots, key=numbers.routing_key)
        return apply_blocks(decoder, params, tokens, call, keep_keys_values=thinking is not None)

    output = batch_vmap(forward)(tokens_BxS, segment_ids_BxS)
    if thinking is not None:
        rows = max(1, min(rows, THOUGHT_BYTES // _bytes_of_one(output.keys_values)))
    R = rows * axis_size("data") * axis_size("fsdp")
    # Put together over fsdp before the loop, not in it.
    head_VxD = head_matrix(params).astype(output.hidden.dtype)
    head = {"head": jax.tree.map(lambda a: constrain(a, "tensor", *[None] * (a.ndim - 1)), head_VxD)}
    pad = lambda a: jnp.pad(a, [(0, -N % R), *[(0, 0)] * (a.ndim - 1)])  # noqa: E731
    where_Nx2, targets_NxT, draws_N = pad(where_Nx2), pad(targets_NxT), pad(draws_N)

    def portion(i: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i * R, R)  # noqa: E731
        (row_R, position_R), targets_RxT = cut(where_Nx2).T, cut(targets_NxT)
        active_R = i * R + jnp.arange(R, dtype=jnp.int32) < count
        hidden_RxD = constrain(output.hidden[row_R, position_R], BATCH_AXES, None)
        if thinking is None:
            logits_RxV, thinks_R = logits_of(head, hidden_RxD), jnp.zeros(R, bool)
        else:
            memory = _memory_of_rows(decoder, output.keys_values, row_R)
            keys_R = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(numbers.seed)))(cut(draws_N))
            last = LastTokens(hidden_RxD, memory, position_R, keys_R, active_R)
            unstacked = UnstackedParams({**params, **head, "groups": groups})
            logits_RxV, record = think_step(decoder, unstacked, thinking, think, numbers.threshold, last)
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
    zeros, flags = jnp.zeros((M, T), jnp.float32), jnp.zeros((M, T), bool)
    empty = (zeros, flags, zeros, flags, jnp.zeros(M, bool))
    overflow_B = jnp.zeros(len(lengths_B), jnp.int32)
    if output.trace is not None:
        overflow_B = jnp.sum(output.trace.overflow, (1, 2), dtype=jnp.int32)
    return *jax.lax.fori_loop(0, (count + R - 1) // R, portion, empty), overflow_B


def _bytes_of_one(keys_values: Any) -> int:
    """Bytes of the keys/values of one text of a batch."""
    return sum(leaf.size * leaf.dtype.itemsize // leaf.shape[0] for leaf in jax.tree.leaves(keys_values))


def _memory_of_rows(decoder: Decoder, keys_values: Any, row_R: jax.Array) -> tuple[Any, Any]:
    """The memory of R thoughts, as `decoding.caches.cached_memory` gives it: nothing is generated, all is prompt."""
    names, groups = block_names(decoder.routing), range(group_count(decoder.config, decoder.routing))

    def pick(of_block: Any, group: int) -> Any:
        def one(leaf: jax.Array) -> jax.Array:
            heads = ("tensor",) if leaf.ndim == 5 else ()  # keys and values: text, group, head, token, width
            return constrain(leaf[row_R, group], BATCH_AXES, *heads)

        return jax.tree.map(one, of_block)

    own = tuple(dict.fromkeys(names, ()) for _ in groups)
    return own, tuple({name: (pick(keys_values[name], group),) for name in names} for group in groups)

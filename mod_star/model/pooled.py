"""A budget that the sequences of a batch share: a routed block's slots are pooled over all of them.

With `Decoder.budget_over` "batch" a routed block has slots for its share of all B·S tokens of a batch, not for a share
of each sequence. A sequence whose tokens score high gets more of them than another; how many the block computes stays a
static shape. The tokens that are computed, of all sequences, are packed into one sequence of N slots for the block.
They have documents of their own there, so that no sequence sees another.

A batch is what `vmap` makes of a `Decoder`: `jax.custom_batching` hands the sequences over together. For scoring texts;
it returns no keys and values, and no experts' load, so that neither generation nor training works with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import struct

from mod_star.config import RoutingConfig
from mod_star.errors import require
from mod_star.model.moves import combine, dispatch, dispatch_ids
from mod_star.model.routing import (
    RoutingCall,
    RoutingMode,
    Tokens,
    Trace,
    causal_logit,
    routed_rows,
    select_first,
    stochastic_noise,
)

if TYPE_CHECKING:
    from mod_star.model.transformer import Decoder


@struct.dataclass
class Judged:
    """S tokens before a routed block, as its router and its causal rule have judged them."""

    tokens: Tokens
    scores_S: jax.Array
    """float32 router scores."""
    logits_S: jax.Array
    """float32 logit of the causal rule."""


def require_poolable(routing: RoutingConfig, name: str, value: str) -> None:
    """Raises InputError, about what the user calls `name`, if a batch cannot share the slots of such a model."""
    require(routing.every > 0, name, value, "must be left out: the model is dense")
    allowed = "must be left out: routing.selection is stochastic, whose noise is of each sequence"
    require(routing.selection == "learned", name, value, allowed)
    allowed = "must be left out: routing.capacity_tokens is a count of each sequence"
    require(routing.capacity_tokens is None, name, value, allowed)
    kept = routing.keep_key_values or routing.adapter_rank > 0
    require(not kept, name, value, "must be left out: the model computes something for tokens that pass by")


def pooled_slots(routing: RoutingConfig, tokens: int) -> npt.NDArray[np.int32]:
    """The most tokens that the causal rule may take of a batch with 0, 1, ..., `tokens` tokens, padding left out.

    headroom times the share of these tokens, int32; the last entry is the number of slots.
    """
    counts = np.arange(tokens + 1)
    share = np.where(counts > 0, np.maximum(1, np.floor(routing.capacity * counts + 0.5)), 0)
    return np.minimum(counts, np.ceil(routing.headroom * share)).astype(np.int32)


def first_in_step(passing_BxS: jax.Array, most: jax.Array) -> jax.Array:
    """The first `most` of the tokens that pass, bool BxS: by position, and of equal positions the earlier sequence.

    So a token's place depends on no later position of any sequence, as if all were written at the same time.
    """
    B, S = passing_BxS.shape
    count_BxS = jnp.cumsum(passing_BxS.T.reshape(-1), dtype=jnp.int32).reshape(S, B).T
    return passing_BxS & (count_BxS <= most)


def pooled_block(
    decoder: Decoder, params: dict[str, Any], tokens: Tokens, call: RoutingCall
) -> tuple[jax.Array, None, Trace, None]:
    """`mod_star.model.routing.routed_block` of a sequence, or under `vmap` of a batch whose sequences share the slots.

    Args:
      decoder: sizes and parts.
      params: the block's, the same for all sequences.
      tokens: the stream before the block.
      call: its mode. top_k: the best of the batch. causal: those that the rule takes, as far as there are slots.

    Returns:
      The gated delta, SxD, zero where tokens pass by, and the decisions; neither keys/values nor experts' load.
    """
    scores_S = decoder.parts.score(params["router"], tokens.x_NxD, decoder.routing)
    noise = stochastic_noise(None, tokens.positions_N)
    judged = Judged(tokens, scores_S, causal_logit(decoder, params, tokens.x_NxD, scores_S, noise))

    @jax.custom_batching.custom_vmap
    def one(params: dict[str, Any], judged: Judged) -> tuple[jax.Array, Trace]:
        batch = jax.tree.map(lambda leaf: leaf[None], judged)
        result: tuple[jax.Array, Trace] = _batch(decoder, params, batch, call.mode)
        return jax.tree.map(lambda leaf: leaf[0], result)

    @one.def_vmap
    def many(size: int, in_batched: Sequence[Any], params: dict[str, Any], judged: Judged) -> tuple[Any, Any]:
        if any(jax.tree.leaves(in_batched[0])):
            raise NotImplementedError("sequences with parameters of their own cannot share the slots of a block")
        spread = lambda leaf, batched: leaf if batched else jnp.broadcast_to(leaf, (size, *leaf.shape))  # noqa: E731
        result = _batch(decoder, params, jax.tree.map(spread, judged, in_batched[1]), call.mode)
        return result, jax.tree.map(lambda _: True, result)

    delta_SxD, trace = one(params, judged)
    return delta_SxD, None, trace, None


def _batch(decoder: Decoder, params: dict[str, Any], judged: Judged, mode: RoutingMode) -> tuple[jax.Array, Trace]:
    """The gated deltas and the decisions of B sequences; every leaf has a leading axis B."""
    routing, tokens = decoder.routing, judged.tokens
    B, S = judged.scores_S.shape

    def flat(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(B * S, *leaf.shape[2:])

    def of_sequences(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(B, S, *leaf.shape[1:])

    is_token_BxS = tokens.segment_ids_N > 0
    if mode == "top_k":
        selection = decoder.parts.select(flat(judged.scores_S), flat(is_token_BxS), routing)
        overflow_BxS = jnp.zeros((B, S), bool)
    else:
        slots = pooled_slots(routing, B * S)
        passing_BxS = (judged.logits_S > 0) & is_token_BxS
        taken_BxS = first_in_step(passing_BxS, jnp.asarray(slots)[jnp.sum(is_token_BxS, dtype=jnp.int32)])
        selection, overflow_BxS = select_first(flat(taken_BxS), int(slots[-1])), passing_BxS & ~taken_BxS
    # A sequence has at most S documents.
    documents_BxS = jnp.arange(B, dtype=jnp.int32)[:, None] * (S + 1) + tokens.segment_ids_N
    rows = Tokens(
        dispatch(flat(tokens.x_NxD), selection),
        dispatch_ids(flat(tokens.positions_N), selection),
        dispatch_ids(flat(documents_BxS), selection),
    )
    scores_C = dispatch(flat(judged.scores_S), selection)
    gated_CxD, gates_C, _, _ = routed_rows(decoder, params, rows, scores_C, selection.filled_C, ())
    mask_BxS, gates_BxS = of_sequences(selection.mask_S), of_sequences(combine(gates_C, selection))
    trace = Trace(judged.scores_S, mask_BxS, gates_BxS, judged.logits_S, overflow_BxS)
    return of_sequences(combine(gated_CxD, selection)), trace

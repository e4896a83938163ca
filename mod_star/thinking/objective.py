"""The Quiet-STaR objective for a batch (arXiv 2403.09629, Algorithm 1): choose positions, think, score, learn.

    loss = base_weight · NLL of the text
         + talk_weight · NLL of the text after thoughts, mixed with the base prediction
         + policy_weight · REINFORCE: -max(r, 0) · log p(thought), summed over its tokens
    r    = log p_talk(n_true tokens) - its mean over the thoughts of the position (`mod_star.thinking.rewards`)

NLLs are means over predictions. REINFORCE is divided by the number of predictions, too, for r is a sum over them: with
leave_one_out, negative rewards kept, temperature 1 and talk_weight = policy_weight, the expected gradient of the last
two terms is that of talk_weight · the expected NLL after thoughts (tests/thinking/test_reinforce.py).

Axes: B sequences, S tokens, G routed blocks, J thinking positions, M thoughts per position, T thought tokens, N tokens
that are predicted (n_true).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mod_star.config import ThinkingConfig
from mod_star.distributed.sharding import batch_vmap, put_together
from mod_star.errors import require
from mod_star.model import Output
from mod_star.model.cross_entropy import chunked, cross_entropy_by_token, unchunked
from mod_star.model.lora import with_merged
from mod_star.model.product_weights import narrow_types
from mod_star.model.routing import select_top
from mod_star.model.transformer import head_matrix
from mod_star.thinking.mixing import mixed_cross_entropy_by_token, thought_weight
from mod_star.thinking.rewards import advantages_of
from mod_star.thinking.sample import Place, ThinkingDecoder, sample_thought
from mod_star.thinking.scan_sum import scan_sum
from mod_star.thinking.score import score_thought
from mod_star.thinking.thought import Thought, latent_input, latent_thought
from mod_star.thinking.where import position_scores

Batch = dict[str, jax.Array]


@struct.dataclass
class Places:
    """Where a batch thinks."""

    indices_BxJ: jax.Array
    """int32 index in the sequence, ascending."""
    filled_BxJ: jax.Array
    """bool; False where a sequence has fewer than J positions to think at (padding, ends of documents)."""


@struct.dataclass
class Talk:
    """What came of thinking, per prediction; float32, without gradient."""

    nll_BxJxMxN: jax.Array
    """Negative log-likelihood of the mixed prediction, in nats."""
    weights_BxJxMxN: jax.Array
    """Mixing weight w of the thought."""
    advantages_BxJxM: jax.Array
    """Reward of each thought less its baseline, before negative ones are dropped."""
    log_probs_BxJxM: jax.Array
    """log p(thought) as it was scored, over `policy_temperature`; zeros without REINFORCE."""
    computed_BxJxMxG: jax.Array
    """Share of [<start>; thought; <end>; continuation] that each routed block computed; G is 0 for a dense model."""
    overflow_BxJxMxG: jax.Array
    """Share of these tokens that the causal rule wanted, but no slot was left for."""


def place_count(thinking: ThinkingConfig, tokens: int) -> int:
    """J for sequences of `tokens` tokens: think_fraction of the positions that n_true tokens can follow.

    Raises:
      InputError: there is no such position.
    """
    n_true = thinking.n_true
    require(n_true <= tokens, "thinking.n_true", n_true, f"must be at most the length of a sequence, {tokens}")
    return max(1, int(thinking.think_fraction * (tokens - thinking.n_true + 1) + 0.5))


def most_places(batch: Batch, thinking: ThinkingConfig) -> jax.Array:
    """Positions to think at in each sequence, int32 B: the share that `place_count` takes, of those without padding."""
    count = batch["tokens"].shape[1] - thinking.n_true + 1
    shares = np.floor(thinking.think_fraction * np.arange(count + 1) + 0.5)
    valid_B = jnp.sum(batch["segment_ids"][:, :count] > 0, 1, dtype=jnp.int32)
    return jnp.asarray(np.maximum(1, shares).astype(np.int32))[valid_B]


def choose_places(
    thinker: ThinkingDecoder, batch: Batch, text_output: Output, head_VxD: jax.Array, key: jax.Array, chunk: int
) -> Places:
    """Chooses the thinking positions: those with the highest scores (`mod_star.thinking.where`), as many as are to be.

    Only positions whose next token is to be predicted count; the choice is MoD's static-shape top-k. Padding has no
    share in the number.
    """
    thinking, (B, S) = thinker.thinking, batch["tokens"].shape
    J, count = place_count(thinking, S), S - thinking.n_true + 1
    eligible = batch["weights"][:, :count] > 0
    if thinking.think_fraction < 1:
        hidden = text_output.hidden[:, :count]
        scores = position_scores(thinker.decoder.parts, thinking, batch, hidden, head_VxD, key, chunk)
    else:  # all of them
        scores = jax.random.uniform(key, (B, count), jnp.float32)
    selection = jax.vmap(lambda s, e, m: select_top(s, e, J, m))(scores, eligible, most_places(batch, thinking))
    return Places(selection.indices_C, selection.filled_C)


def memory_of(text_output: Output) -> dict[str, Any]:
    """Keys/values of texts as the memory of thoughts: {block name: (KeyValues,)}."""
    return {name: (key_values,) for name, key_values in text_output.keys_values.items()}


def sample_thoughts(
    thinker: ThinkingDecoder,
    params: dict[str, Any],
    text_output: Output,
    batch: Batch,
    places: Places,
    key: jax.Array,
    temperature: float,
) -> Thought:
    """Samples M thoughts at every place, all in parallel; no gradients. Leaves of the result are [B, J, M, ...].

    What is drawn at a position depends on the key, the sequence's row, the position and the thought's number alone.
    Of latent thoughts there is nothing to draw; `talk_loss` runs their steps.
    """
    thinking = thinker.thinking
    if latent_input(thinker.decoder.parts, thinking) is not None:
        shape = (*places.indices_BxJ.shape, thinking.n_thoughts)
        nothing = latent_thought(thinking.thought_length)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape)), nothing)
    params, text_output = jax.lax.stop_gradient((params, text_output))
    if thinking.gather == "step":
        params = with_merged(params)
        types = narrow_types(thinker.decoder, params)
        params = put_together(jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, types))

    def sequence(
        memory: Any, positions_S: jax.Array, ids_S: jax.Array, indices_J: jax.Array, key: jax.Array
    ) -> Thought:
        def one(index: jax.Array, number: jax.Array) -> Thought:
            own_key = jax.random.fold_in(jax.random.fold_in(key, index), number)
            place = Place(positions_S[index], ids_S[index])
            return sample_thought(thinker, params, memory, place, own_key, temperature)[0]

        # One vmap over both, not one inside the other: what only the outer one batches would keep a routed block's rows
        # of different positions out of the same chunk (`mod_star.model.rows`), and few would be skipped.
        M = thinking.n_thoughts
        rows = jax.vmap(one)(jnp.repeat(indices_J, M), jnp.tile(jnp.arange(M, dtype=jnp.int32), indices_J.shape[0]))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, M, *leaf.shape[1:]), rows)

    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(
        jnp.arange(places.indices_BxJ.shape[0], dtype=jnp.int32)
    )
    return batch_vmap(sequence)(
        memory_of(text_output), batch["positions"], batch["segment_ids"], places.indices_BxJ, keys_B
    )


def talk_loss(
    thinker: ThinkingDecoder,
    params: dict[str, Any],
    text_output: Output,
    batch: Batch,
    places: Places,
    thoughts: Thought,
    loss_chunk: int,
) -> tuple[jax.Array, Talk]:
    """talk_weight · NLL after thoughts + policy_weight · REINFORCE; differentiable in params and the text's output.

    Computed in chunks of `thinking.chunk` positions per sequence, one after the other.
    """
    thinking = thinker.thinking
    J = places.indices_BxJ.shape[1]
    chunk = min(thinking.chunk, J)
    shared = (params, text_output.hidden, memory_of(text_output), batch, talk_total(batch, places, thinking))

    def function(shared: Any, part: Any) -> tuple[jax.Array, Talk]:
        return _talk_loss_of_chunk(thinker, loss_chunk, shared, *part)

    parts = jax.tree.map(lambda leaf: chunked(leaf, chunk), (places, thoughts))
    loss, talk = scan_sum(function, shared, parts)
    return loss, jax.tree.map(lambda leaf: unchunked(leaf, J), talk)


def predicted(batch: Batch, places: Places, thinking: ThinkingConfig) -> tuple[jax.Array, jax.Array]:
    """Indices BxJxN of the predictions that follow each place, and their float32 weights.

    0 for predictions beyond the document of the place, or that the batch gives no weight, or of places not filled.
    """
    index = places.indices_BxJ[..., None] + jnp.arange(thinking.n_true, dtype=jnp.int32)
    take = jax.vmap(lambda row, at: row[at])
    same = take(batch["segment_ids"], index) == take(batch["segment_ids"], places.indices_BxJ)[..., None]
    return index, take(batch["weights"], index) * same * places.filled_BxJ[..., None]


def talk_total(batch: Batch, places: Places, thinking: ThinkingConfig) -> jax.Array:
    """Weight of all predictions after thoughts, what NLL and REINFORCE are divided by; float32, at least 1."""
    _, weights = predicted(batch, places, thinking)
    return jnp.maximum(jnp.sum(weights) * thinking.n_thoughts, 1.0)


def _talk_loss_of_chunk(
    thinker: ThinkingDecoder, loss_chunk: int, shared: Any, places: Places, thoughts: Thought
) -> tuple[jax.Array, Talk]:
    thinking, parts = thinker.thinking, thinker.decoder.parts
    params, hidden_BxSxD, memory, batch, total = shared
    B, J, M, T = thoughts.tokens_T.shape
    N, D = thinking.n_true, hidden_BxSxD.shape[-1]
    index_BxJxN, weights_BxJxN = predicted(batch, places, thinking)

    def sequence(
        memory: Any, tokens_S: jax.Array, positions_S: jax.Array, ids_S: jax.Array, indices_J: jax.Array, thoughts: Any
    ) -> Any:
        def one(index: jax.Array, thought: Thought) -> Any:
            following = tokens_S[index + 1 + jnp.arange(N - 1, dtype=jnp.int32)]
            place = Place(positions_S[index], ids_S[index])
            return score_thought(thinker, params, memory, place, thought, following)

        return jax.vmap(jax.vmap(one, (None, 0)))(indices_J, thoughts)

    scored = batch_vmap(sequence)(
        memory, batch["tokens"], batch["positions"], batch["segment_ids"], places.indices_BxJ, thoughts
    )
    gather = jax.vmap(lambda row, at: row[at])
    base = jnp.broadcast_to(gather(hidden_BxSxD, index_BxJxN)[:, :, None], (B, J, M, N, D)).reshape(-1, D)
    talk = scored.talk_NxD.reshape(-1, D)
    mixing = thought_weight(parts, thinking, params, base, talk)

    head = head_matrix(params)
    shape = (B, J, M, N)
    targets = jnp.broadcast_to(gather(batch["targets"], index_BxJxN)[:, :, None], shape)
    weights = jnp.broadcast_to(weights_BxJxN[:, :, None], shape)
    rows = lambda a: a.reshape(B, -1, *a.shape[4:])  # noqa: E731
    loss, nll = mixed_cross_entropy_by_token(
        rows(base.reshape(*shape, D)), rows(talk.reshape(*shape, D)), rows(mixing.reshape(shape)), head, rows(targets),
        rows(weights) * (thinking.talk_weight / total), loss_chunk,
    )  # fmt: skip
    nll_BxJxMxN = nll.reshape(shape)
    advantage = advantages_of(parts, thinking, -(nll_BxJxMxN * weights), thoughts)
    advantage = jnp.where(places.filled_BxJ[..., None], advantage, 0.0)  # whatever a reward makes of no thought
    log_probs = jnp.zeros((B, J, M), jnp.float32)
    if thinking.policy_weight > 0 and latent_input(parts, thinking) is None:
        used = jnp.maximum(advantage, 0.0) if thinking.drop_negative else advantage
        drawn = thoughts.tokens_T >= 0  # a pause has no log-probability
        used = jnp.where(drawn, used[..., None] * (thinking.policy_weight / total), 0.0)
        policy, thought_nll = cross_entropy_by_token(
            rows(scored.thought_TxD), head, rows(jnp.maximum(thoughts.tokens_T, 0)), rows(used), loss_chunk,
            thinking.policy_temperature,
        )  # fmt: skip
        loss += policy
        log_probs = -jnp.sum(thought_nll.reshape(B, J, M, T), -1, where=drawn)
    computed = overflow = jnp.zeros((B, J, M, 0), jnp.float32)
    if scored.trace is not None:
        computed, overflow = (
            jnp.mean(decided, -1, dtype=jnp.float32) for decided in (scored.trace.selected, scored.trace.overflow)
        )
    return loss, Talk(nll_BxJxMxN, mixing.reshape(shape), advantage, log_probs, computed, overflow)

"""Mixture-of-Depths routing for one sequence: score, select, decide causally, gate and combine (arXiv 2404.02258).

`routed_block` is the method. What it decides with are functions that `mod_star.model.parts.Parts` replaces: the router,
the selection, the causal rule, the gate, the block and the loss that trains the rule. The built-in ones are below.

C is the number of slots of a routed block, S the tokens of the sequence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax import struct

from mod_star.config import ModelConfig, RoutingConfig
from mod_star.errors import InputError
from mod_star.model.attention import KeyValues
from mod_star.model.experts import Load
from mod_star.model.layers import Params, fan_in_normal, unit_rms
from mod_star.model.linear import linear
from mod_star.model.moves import Selection, combine, dispatch, dispatch_ids
from mod_star.model.noise import noise_threshold, position_noise
from mod_star.model.precision import HIGHEST
from mod_star.model.rows import compute_if

if TYPE_CHECKING:
    from mod_star.model.transformer import Decoder

RoutingMode = Literal["top_k", "causal"]
Noise = Callable[[], jax.Array]
"""Draws the float32 noise S that stochastic routing decides by, once however often it is called."""


@struct.dataclass
class Tokens:
    """N tokens of a sequence, given as embeddings."""

    x_NxD: jax.Array
    """The stream, in the compute type."""
    positions_N: jax.Array
    """int32 positions in the document."""
    segment_ids_N: jax.Array
    """int32 document ids, 0 for padding."""


@struct.dataclass
class RoutingCall:
    """How routed blocks decide in one pass over tokens."""

    mode: RoutingMode = struct.field(pytree_node=False, default="causal")
    """As for `Decoder`."""
    slots: int | None = struct.field(pytree_node=False, default=None)
    """The most tokens that a block may compute under the causal rule. None: as many as for the model's context."""
    key: jax.Array | None = None
    """Of the noise; needed by stochastic routing and by exploration only."""
    exploration: jax.Array | None = None
    """float32 factor of `RoutingConfig.noise` and `RoutingConfig.explore`, in top_k mode. None: no exploration."""
    taken: Any = None
    """int32 slots that earlier tokens have taken: an array [groups] or a tuple; of one block a scalar. None: none."""
    decided: jax.Array | None = None
    """int8 [groups, N], of one block [N]: decisions to repeat. 1: computed, 0: passed by, -1: the rule decides."""
    with_gradient: bool = struct.field(pytree_node=False, default=False)
    """True: a routed block computes a single token that has a memory even where the token passes by, with the same
    result. Rows that are skipped (`mod_star.model.rows`) have no gradient under `vmap`."""


@struct.dataclass
class Trace:
    """What the routed blocks decided; each array is [groups, S]."""

    scores: jax.Array
    """float32 router scores r."""
    selected: jax.Array
    """bool; the tokens that were computed."""
    gates: jax.Array
    """float32 gate of the selected tokens, 0 elsewhere."""
    logits: jax.Array
    """float32 logit of the causal rule: positive means "compute this token"."""
    overflow: jax.Array
    """bool; tokens that the causal rule wanted but no slot was left for."""
    by_score: jax.Array | None = None
    """bool; the tokens that the scores alone select, which the causal rule is to learn. None: those in `selected`."""


def capacity_of(routing: RoutingConfig, tokens: int) -> int:
    """C for a sequence of `tokens` tokens: the configured share rounded to the nearest count, at least 1."""
    if routing.capacity_tokens is not None:
        return min(tokens, routing.capacity_tokens)
    return min(tokens, max(1, math.floor(routing.capacity * tokens + 0.5)))


def capacities(routing: RoutingConfig, tokens: int) -> npt.NDArray[np.int32]:
    """`capacity_of` for 0, 1, ..., `tokens` tokens, int32; 0 for none. It never falls."""
    counts = np.arange(tokens + 1)
    if routing.capacity_tokens is not None:
        return np.minimum(counts, routing.capacity_tokens).astype(np.int32)
    rounded = np.floor(routing.capacity * counts + 0.5)
    return np.minimum(counts, np.maximum(1, rounded)).astype(np.int32)


def routed_share(routing: RoutingConfig, tokens: int) -> float:
    """C as a share of a sequence of `tokens` tokens."""
    return capacity_of(routing, tokens) / tokens


def causal_slots(routing: RoutingConfig, tokens: int) -> int:
    """Slots of a routed block under the causal rule, which decides one by one and may exceed C: headroom times C."""
    return min(tokens, math.ceil(routing.headroom * capacity_of(routing, tokens)))


def select_share(scores_S: jax.Array, valid_S: jax.Array, routing: RoutingConfig) -> Selection:
    """Expert choice of a sequence's share: as many of its valid tokens as a sequence without padding would get.

    There are slots for the capacity of the whole sequence; how many are filled follows the number of valid tokens.
    """
    S = scores_S.shape[0]
    most = jnp.asarray(capacities(routing, S))[jnp.sum(valid_S, dtype=jnp.int32)]
    return select_top(scores_S, valid_S, capacity_of(routing, S), most)


def select_top(scores_S: jax.Array, valid_S: jax.Array, slots: int, most: jax.Array | None = None) -> Selection:
    """The tokens with the highest scores, in order of position; of equal scores the earlier wins.

    Args:
      scores_S: float32 router scores.
      valid_S: bool; tokens that may be selected. Pads never are: with fewer valid tokens than slots, slots stay empty.
      slots: C, static.
      most: int32 scalar, tokens to select at most; None: C.
    """
    # -inf puts pads after every real score; a real -inf or NaN loses to real scores but never lets a pad in.
    ranks_S = jnp.where(valid_S, jnp.nan_to_num(scores_S, nan=-3e38, neginf=-3e38), -jnp.inf)
    best_S = jnp.argsort(jnp.where(ranks_S == 0, 0.0, ranks_S), descending=True)  # stable
    # By places and not by comparing with the last score: XLA may compute scores twice, with other rounding.
    place_S = jnp.argsort(best_S)
    taken_S = place_S < jnp.minimum(jnp.sum(valid_S, dtype=jnp.int32), slots if most is None else most)
    chosen = in_order(place_S < slots, slots)
    return replace(chosen, filled_C=taken_S[chosen.indices_C], mask_S=taken_S)


def select_first(passing_S: jax.Array, slots: int) -> Selection:
    """Causal choice: tokens take a slot in order of position until `slots` are taken; the rest passes by.

    Whether token i is computed depends on tokens up to i alone.
    """
    return in_order(passing_S & (jnp.cumsum(passing_S, dtype=jnp.int32) <= slots), slots)


def in_order(mask_S: jax.Array, slots: int) -> Selection:
    """The selection of these tokens, which are at most `slots`, in order of position.

    By a sort: to look up each slot among all tokens would take S·C comparisons, and memory for them on a CPU.
    """
    S = mask_S.shape[0]
    tokens_C = jnp.sort(jnp.where(mask_S, jnp.arange(S, dtype=jnp.int32), S))[:slots]
    slot_S = jnp.clip(jnp.cumsum(mask_S, dtype=jnp.int32) - 1, 0, slots - 1)
    return Selection(jnp.minimum(tokens_C, S - 1), tokens_C < S, mask_S, slot_S)


def linear_router_init(key: jax.Array, config: ModelConfig) -> Params:
    """Parameters of `linear_router`: one weight per width."""
    return {"weight": fan_in_normal(key, (config.width,), config.width)}


def linear_router(params: Params, x_SxD: jax.Array) -> jax.Array:
    """The paper's router: r = x·w, a float32 scalar per token."""
    return jnp.matmul(x_SxD.astype(jnp.float32), params["weight"], precision=HIGHEST)


GATES = {
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda r: r,
    "tanh": lambda r: 1 + 0.2 * jnp.tanh(r),
}
"""What multiplies a routed block's output, by `RoutingConfig.gate`; elementwise, so it cannot leak the future."""


def predictor_init(key: jax.Array, config: ModelConfig, routing: RoutingConfig) -> Params:
    """Parameters of `predict`: a hidden layer and an output of zeros, so that training starts at probability 1/2.

    With `routing.budgets` there is one output for each: output PxB and shift B, else P and a scalar.
    """
    D, P = config.width, routing.predictor_width
    outputs = (len(routing.budgets),) if routing.budgets else ()
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    return {
        "hidden": fan_in_normal(key, (D, P), D),
        "bias": zeros(P),
        "output": zeros((P, *outputs)),
        "shift": zeros(outputs),
    }


def predict(params: Params, x_SxD: jax.Array, budget: int | None = None) -> jax.Array:
    """The auxiliary predictor: float32 logit of "this token will be among the top C", from the token alone.

    Its input is detached and brought to unit RMS: training it costs the language model nothing.

    Args:
      params: from `predictor_init`.
      x_SxD: the stream before the block.
      budget: number of the output, in a model that has one for each of `routing.budgets`.
    """
    output_P, shift = params["output"], params["shift"]
    if budget is not None:
        output_P, shift = output_P[:, budget], shift[budget]
    x = unit_rms(jax.lax.stop_gradient(x_SxD))
    hidden = jax.nn.relu(linear(x, params["hidden"], precision="highest") + params["bias"])
    return jnp.matmul(hidden, output_P, precision=HIGHEST) + shift


def stochastic_noise(key: jax.Array | None, positions_S: jax.Array) -> Noise:
    """The noise of these positions, drawn when something asks for it.

    Raises:
      InputError: when drawn, without a key.
    """

    def draw() -> jax.Array:
        if key is None:
            raise InputError("routing.selection = 'stochastic': needs a key")
        return position_noise(key, positions_S)

    return functools.cache(draw)


def expert_choice(scores_S: jax.Array, valid_S: jax.Array, routing: RoutingConfig, noise: Noise) -> Selection:
    """The tokens with the highest router scores (section 3.2)."""
    del noise
    return select_share(scores_S, valid_S, routing)


def stochastic_choice(scores_S: jax.Array, valid_S: jax.Array, routing: RoutingConfig, noise: Noise) -> Selection:
    """The tokens with the highest noise, the paper's control (section 4.1)."""
    del scores_S
    return select_share(noise(), valid_S, routing)


def predictor_rule(
    params: Params, x_SxD: jax.Array, scores_S: jax.Array, noise: Noise, routing: RoutingConfig, context: int
) -> jax.Array:
    """Causal rule: the auxiliary predictor's logit (section 3.5), of the budget that `routing.capacity` is."""
    del scores_S, noise, context
    return predict(params, x_SxD, routing.budgets.index(routing.capacity) if routing.budgets else None)


def predictor_flops(model: ModelConfig, tokens: int, routing: RoutingConfig) -> float:
    """Operations of `predict` for `tokens` tokens."""
    return 2.0 * tokens * (model.width * routing.predictor_width + routing.predictor_width)


def router_rule(
    params: Params, x_SxD: jax.Array, scores_S: jax.Array, noise: Noise, routing: RoutingConfig, context: int
) -> jax.Array:
    """Causal rule: the router's own score is the logit (section 3.5)."""
    del params, x_SxD, noise, routing, context
    return scores_S


def stochastic_rule(
    params: Params, x_SxD: jax.Array, scores_S: jax.Array, noise: Noise, routing: RoutingConfig, context: int
) -> jax.Array:
    """Causal rule of stochastic routing: noise above the threshold that the configured share of a context passes."""
    del params, x_SxD, scores_S
    return noise() - noise_threshold(routed_share(routing, context))


def no_parameters(key: jax.Array, config: ModelConfig, routing: RoutingConfig) -> Params:
    """Parameters of a rule that has none."""
    del key, config, routing
    return {}


def no_flops(model: ModelConfig, tokens: int, routing: RoutingConfig) -> float:
    """Operations of a rule without matrix products."""
    del model, tokens, routing
    return 0.0


def rule_cross_entropy(trace: Trace, valid_BxS: jax.Array, target: jax.Array) -> jax.Array:
    """Binary cross-entropy of the causal rule, in nats, summed over the valid tokens: float32 [groups] (section 3.5).

    Args:
      trace: of a batch, [B, groups, S] arrays; the gradient reaches the logits only.
      valid_BxS: bool; False for padding.
      target: bool [B, groups, S], the tokens that top-k routing selects.
    """
    loss = optax.sigmoid_binary_cross_entropy(trace.logits, target.astype(jnp.float32))
    return jnp.sum(jnp.where(valid_BxS[:, None], loss, 0), (0, 2), dtype=jnp.float32)


def causal_logit(
    decoder: Decoder, params: dict[str, Any], x_SxD: jax.Array, scores_S: jax.Array, noise: Noise
) -> jax.Array:
    """Float32 logit of the causal rule for each token, from that token alone: positive means "compute it".

    Args:
      decoder: names the rule.
      params: the routed block's.
      x_SxD: the stream before the block.
      scores_S: router scores.
      noise: of the tokens' positions, see `stochastic_noise`.
    """
    return decoder.parts.decide(params.get("predictor", {}), x_SxD, scores_S, noise, decoder.routing, decoder.config)


def routed_block(
    decoder: Decoder,
    params: dict[str, Any],
    tokens: Tokens,
    call: RoutingCall,
    memory: tuple[KeyValues, ...] = (),
) -> tuple[jax.Array, KeyValues, Trace, Load | None]:
    """What a routed block adds to the stream, SxD; its keys/values, decisions, and experts' load.

    To the tokens that it computes it adds their gated delta, to those that pass by the adapter's output, or nothing.
    The keys/values are those of the C slots, or with `routing.keep_key_values` those of all tokens.

    Args:
      decoder: sizes and parts.
      params: the block's.
      tokens: the stream before the block.
      call: how to decide; `taken` and `decided` are this block's.
      memory: keys/values that the tokens attend to besides their own.
    """
    config, routing, parts = decoder.config, decoder.routing, decoder.parts
    x_SxD, S = tokens.x_NxD, tokens.x_NxD.shape[0]
    valid_S = tokens.segment_ids_N > 0
    scores_S = parts.score(params["router"], x_SxD, routing)
    noise = stochastic_noise(call.key, jnp.arange(S, dtype=jnp.int32))
    logits_S = causal_logit(decoder, params, x_SxD, scores_S, noise)
    by_score_S = None
    if call.mode == "top_k":
        selection = parts.select(scores_S, valid_S, routing, noise)
        if call.exploration is not None:
            by_score_S = selection.mask_S
            selection = parts.explore(scores_S, valid_S, routing, call, noise)
        overflow_S = jnp.zeros(S, bool)
    else:
        slots = causal_slots(routing, config.context) if call.slots is None else call.slots
        rule_S = (logits_S > 0) & valid_S
        passing_S = rule_S if call.decided is None else jnp.where(call.decided < 0, rule_S, call.decided > 0)
        room = slots if call.taken is None else slots - call.taken
        selection = select_first(passing_S & (jnp.cumsum(passing_S, dtype=jnp.int32) <= room), min(S, slots))
        overflow_S = rule_S & ~selection.mask_S  # also where a repeated decision was that no slot was left

    kept, before = None, memory
    if routing.keep_key_values:
        kept = parts.keys_values(params["block"], tokens, config)
        before = (*memory, replace(kept, valid_M=kept.valid_M & ~selection.mask_S))
    rows = functools.partial(routed_rows, decoder)
    x_CxD, scores_C = dispatch(x_SxD, selection), dispatch(scores_S, selection)
    positions_C = dispatch_ids(tokens.positions_N, selection)
    selected = Tokens(x_CxD, positions_C, dispatch_ids(tokens.segment_ids_N, selection))
    arrays = (params, selected, scores_C, selection.filled_C, before)
    if memory and S == 1 and not call.with_gradient:
        share = routed_share(routing, config.context)
        gated_CxD, gates_C, own, load = compute_if(selection.filled_C[0], rows, arrays, share)
    else:
        gated_CxD, gates_C, own, load = rows(*arrays)
    trace = Trace(scores_S, selection.mask_S, combine(gates_C, selection), logits_S, overflow_S, by_score_S)
    delta_SxD = combine(gated_CxD, selection)
    passing_SxD = parts.adapt(params.get("adapter", {}), x_SxD, routing)
    if passing_SxD is not None:
        delta_SxD += jnp.where(selection.mask_S[:, None], 0, passing_SxD)
    return delta_SxD, own if kept is None else kept, trace, load


def routed_rows(
    decoder: Decoder,
    params: dict[str, Any],
    tokens: Tokens,
    scores_C: jax.Array,
    filled_C: jax.Array,
    memory: tuple[KeyValues, ...],
) -> tuple[jax.Array, jax.Array, KeyValues, Load | None]:
    """g(r)·f(x) of the rows that a routed block computes (section 3.3 of the paper).

    Returns:
      The gated delta CxD in x's type, the float32 gates C, the rows' keys/values, and their experts' load.
    """
    arrays = (tokens.x_NxD, tokens.positions_N, tokens.segment_ids_N, filled_C, memory)
    delta_CxD, own, load = decoder.parts.compute_block(params["block"], *arrays, decoder.config)
    gates_C = decoder.parts.gate_of(decoder.routing)(scores_C)
    return (delta_CxD * gates_C[:, None]).astype(tokens.x_NxD.dtype), gates_C, own, load

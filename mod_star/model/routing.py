"""Mixture-of-Depths routing for one sequence: who is computed, how their rows get in and out (arXiv 2404.02258).

Selected indices are unique and sorted, so the inverse of "token of slot c" is "slot of token i", and moving rows in
either direction is a gather. `dispatch` and `combine` are each other's transposes and say so to autodiff: no scatter
appears in the forward or the backward pass (a scatter-add made the training step as slow as the dense one).

C is the number of slots of a routed block, S the tokens of the sequence.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import struct

from mod_star import random_streams
from mod_star.config import ModelConfig, RoutingConfig
from mod_star.model.layers import Params, fan_in_normal
from mod_star.model.linear import linear
from mod_star.model.precision import HIGHEST


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


@struct.dataclass
class Selection:
    """Which tokens a routed block computes, as a one-to-one map between C slots and S tokens."""

    indices_C: jax.Array
    """int32 token of each slot, ascending; meaningless where the slot is not filled."""
    filled_C: jax.Array
    """bool; False for slots left over when fewer than C tokens are selected."""
    mask_S: jax.Array
    """bool; True for the tokens that have a slot."""
    slot_S: jax.Array
    """int32 slot of each token, in [0, C); meaningless where the mask is False."""


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
    S = scores_S.shape[0]
    # -inf puts pads behind every real score; a real -inf or NaN loses to real scores but never lets a pad in.
    ranks_S = jnp.where(valid_S, jnp.nan_to_num(scores_S, nan=-3e38, neginf=-3e38), -jnp.inf)
    # top_k takes the earlier of equal scores, but 0.0 before -0.0.
    _, chosen_C = jax.lax.top_k(jnp.where(ranks_S == 0, 0.0, ranks_S), slots)  # the best first
    taken_C = valid_S[chosen_C]
    if most is not None:
        taken_C &= jnp.arange(slots, dtype=jnp.int32) < most
    pairs_C = jnp.sort(2 * chosen_C.astype(jnp.int32) + taken_C)  # in one: two operands take longer to sort
    indices_C, filled_C = pairs_C // 2, pairs_C % 2 == 1
    slot_S = jnp.searchsorted(indices_C, jnp.arange(S, dtype=jnp.int32), method="compare_all")
    slot_S = jnp.minimum(slot_S, slots - 1).astype(jnp.int32)
    mask_S = (indices_C[slot_S] == jnp.arange(S, dtype=jnp.int32)) & filled_C[slot_S]
    return Selection(indices_C, filled_C, mask_S, slot_S)


def select_first(wanted_S: jax.Array, slots: int) -> Selection:
    """Causal choice: tokens take a slot in order of position until `slots` are taken; the rest passes by.

    Whether token i is computed depends on tokens up to i alone.
    """
    count_S = jnp.cumsum(wanted_S, dtype=jnp.int32)
    mask_S = wanted_S & (count_S <= slots)
    indices_C = jnp.searchsorted(count_S, jnp.arange(1, slots + 1, dtype=jnp.int32), method="compare_all")
    filled_C = jnp.arange(slots, dtype=jnp.int32) < count_S[-1]
    indices_C = jnp.minimum(indices_C, wanted_S.shape[0] - 1).astype(jnp.int32)
    return Selection(indices_C, filled_C, mask_S, jnp.clip(count_S - 1, 0, slots - 1))


def _rows(x: jax.Array, indices: jax.Array, keep: jax.Array) -> jax.Array:
    rows = jnp.take(x, indices, axis=0, mode="clip")
    return jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), rows, 0)


@jax.custom_vjp
def dispatch(x_SxD: jax.Array, selection: Selection) -> jax.Array:
    """Rows of the selected tokens, CxD (or C from S); zeros in empty slots."""
    return _rows(x_SxD, selection.indices_C, selection.filled_C)


@jax.custom_vjp
def combine(y_CxD: jax.Array, selection: Selection) -> jax.Array:
    """Puts the slots' rows back at their tokens, SxD; zeros at the tokens that pass by."""
    return _rows(y_CxD, selection.slot_S, selection.mask_S)


dispatch.defvjp(
    lambda x, selection: (dispatch(x, selection), selection),
    lambda selection, grad: (combine(grad, selection), None),
)
combine.defvjp(
    lambda y, selection: (combine(y, selection), selection),
    lambda selection, grad: (dispatch(grad, selection), None),
)


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
    """Parameters of `predict`: a hidden layer and an output of zeros, so that training starts at probability 1/2."""
    D, P = config.width, routing.predictor_width
    hidden = fan_in_normal(key, (D, P), D)
    zeros_P = jnp.zeros(P, jnp.float32)
    return {"hidden": hidden, "bias": zeros_P, "output": zeros_P, "shift": jnp.zeros((), jnp.float32)}


def predict(params: Params, x_SxD: jax.Array) -> jax.Array:
    """The auxiliary predictor: float32 logit of "this token will be among the top C", from the token alone.

    Its input is detached and brought to unit RMS: training it costs the language model nothing.
    """
    x = jax.lax.stop_gradient(x_SxD).astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    hidden = jax.nn.relu(linear(x, params["hidden"], precision="highest") + params["bias"])
    return jnp.matmul(hidden, params["output"], precision=HIGHEST) + params["shift"]


def position_noise(key: jax.Array, positions_S: jax.Array) -> jax.Array:
    """Standard normal float32 per position, the same for a position however the sequence is cut up.

    From a stream of its own: whatever else is drawn from `key`, or from a key of the same seed, tells nothing of it.
    """
    key = jax.random.fold_in(key, random_streams.ROUTING_NOISE)

    def noise(position: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, position), (), jnp.float32)

    return jax.vmap(noise)(positions_S)


def noise_threshold(routing: RoutingConfig, tokens: int) -> jax.Array:
    """What noise must exceed for a token to be routed with probability C/S: stochastic routing's causal rule."""
    share = routed_share(routing, tokens)
    # Finite at C = S too: an infinite logit would make the routing entropy NaN.
    return jnp.maximum(-jax.scipy.special.ndtri(jnp.float32(share)), -1e9)

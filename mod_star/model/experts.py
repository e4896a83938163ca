"""A mixture of experts as the feed-forward part: each token chooses a few of several feed-forward layers.

In a routed block that is *staged* Mixture-of-Depths-and-Experts, with null experts and attention for all tokens
*integrated* (arXiv 2404.02258, section 4.3). Token choice (Shazeer et al. 2017, arXiv 1701.06538): a softmax over all
experts, of which the best few are chosen. No token is dropped, and a token's experts depend on that token alone.

N tokens, D width, I hidden width of an expert, X experts, Z experts and null experts, A experts that a token chooses.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.config import ModelConfig
from mod_star.model.grouped import grouped_linear
from mod_star.model.layers import fan_in_normal
from mod_star.model.linear import linear


@struct.dataclass
class Choice:
    """Which experts each token chose: what a feed-forward part may return besides its result."""

    probabilities_NxZ: jax.Array
    """float32 softmax of the router's logits."""
    counts_NxZ: jax.Array
    """float32; 1 for the experts that the token chose, else 0."""
    bias_Z: jax.Array | None = None
    """float32, what the choice adds to the probabilities and the balance moves. None: there is none."""


@struct.dataclass
class Load:
    """Choices of one sequence's tokens in one block, summed."""

    counts_Z: jax.Array
    """float32 tokens that chose each expert."""
    probabilities_Z: jax.Array
    """float32 sum of the tokens' probabilities."""
    tokens: jax.Array
    """float32 number of the tokens."""
    bias_Z: jax.Array | None = None
    """As in `Choice`."""


def load_of(choice: Choice, valid_N: jax.Array) -> Load:
    """The load of the valid tokens."""
    total = lambda a: jnp.sum(jnp.where(valid_N[:, None], a, 0.0), 0)  # noqa: E731
    tokens = jnp.sum(valid_N, dtype=jnp.float32)
    return Load(total(choice.counts_NxZ), total(choice.probabilities_NxZ), tokens, choice.bias_Z)


def experts_init(key: jax.Array, config: ModelConfig) -> dict[str, Any]:
    """Float32 parameters: router DxZ; experts as of `swiglu`, gate and up XxDxI, down XxIxD; maybe balance_bias Z."""
    D, X, width = config.width, config.experts, config.expert_width
    router, gate, up, down = jax.random.split(key, 4)
    params: dict[str, Any] = {
        "router": fan_in_normal(router, (D, config.all_experts), D),
        "experts": {
            "gate": fan_in_normal(gate, (X, D, width), D),
            "up": fan_in_normal(up, (X, D, width), D),
            "down": fan_in_normal(down, (X, width, D), width, (2 * config.layers) ** -0.5),
        },
    }
    if config.experts_balance == "bias":
        params["balance_bias"] = jnp.zeros(config.all_experts, jnp.float32)
    return params


def experts(params: dict[str, Any], x_NxD: jax.Array, config: ModelConfig) -> tuple[jax.Array, Choice]:
    """The weighted sum of what a token's experts make of it, NxD in x's type, and the choice.

    An expert is a SwiGLU layer. A null expert gives zero, or with `experts_null_kind` copy the token itself (MoE++,
    arXiv 2410.07348), and costs no product. The gradient reaches the router through the weights.
    """
    X, Z = config.experts, config.all_experts
    N, D = x_NxD.shape
    logits_NxZ = linear(x_NxD.astype(jnp.float32), params["router"], precision="highest")
    bias_Z = params.get("balance_bias")
    weights_NxA, chosen_NxA, probabilities_NxZ = choose(logits_NxZ, config.experts_active, bias_Z)

    def product(rows: jax.Array, name: str) -> jax.Array:
        return grouped_linear(rows, params["experts"][name].astype(x_NxD.dtype), chosen_NxA.reshape(-1))

    rows = jnp.repeat(x_NxD, config.experts_active, 0)
    hidden = jax.nn.silu(product(rows, "gate")) * product(rows, "up")
    parts_NxAxD = product(hidden, "down").reshape(N, -1, D)
    if config.experts_null_kind == "copy":
        parts_NxAxD = jnp.where((chosen_NxA >= X)[..., None], x_NxD[:, None], parts_NxAxD)
    result_NxD = jnp.sum(parts_NxAxD * weights_NxA[..., None], 1).astype(x_NxD.dtype)
    counts_NxZ = jnp.sum(jax.nn.one_hot(chosen_NxA, Z, dtype=jnp.float32), 1)
    return result_NxD, Choice(probabilities_NxZ, counts_NxZ, bias_Z)


def choose(logits_NxZ: jax.Array, active: int, bias_Z: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights NxA, int32 experts NxA and probabilities NxZ; the bias chooses, but does not weigh.

    One expert's weight is its probability (Switch, arXiv 2101.03961). The weights of several add up to 1 (Mixtral,
    arXiv 2401.04088); that of one would then always be 1, and have no gradient.
    """
    probabilities_NxZ = jax.nn.softmax(logits_NxZ.astype(jnp.float32), -1)
    ranks_NxZ = jax.lax.stop_gradient(probabilities_NxZ if bias_Z is None else probabilities_NxZ + bias_Z)
    _, chosen_NxA = jax.lax.top_k(ranks_NxZ, active)
    chosen_NxA = chosen_NxA.astype(jnp.int32)
    if active == 1:
        return jnp.take_along_axis(probabilities_NxZ, chosen_NxA, 1), chosen_NxA, probabilities_NxZ
    weights_NxA = jax.nn.softmax(jnp.take_along_axis(logits_NxZ.astype(jnp.float32), chosen_NxA, 1), -1)
    return weights_NxA, chosen_NxA, probabilities_NxZ


def balance_loss(load: Load, config: ModelConfig) -> jax.Array:
    """What balances the experts of one block over one sequence, a float32 scalar; 0 where no token is valid.

    aux: Z · Σ f·p, with the shares f of all choices and the mean probabilities p (Switch, equation 4; by sequence as in
    DeepSeek-V3, arXiv 2412.19437): 1 at balance. bias: always 0, but its gradient in the bias is f - 1/Z, so that a
    step lowers the bias of what is chosen too often (arXiv 2408.15664, with the optimizer in place of a fixed step).
    Null experts count with their mean share: which of them is chosen is all the same (AdaMoE, arXiv 2406.13233).
    """
    Z = load.counts_Z.shape[0]
    X = config.experts or Z  # a user's part may have experts that the configuration does not know
    shares_Z = load.counts_Z / jnp.maximum(jnp.sum(load.counts_Z), 1.0)
    if Z > X:
        shares_Z = jnp.concatenate([shares_Z[:X], jnp.full(Z - X, jnp.mean(shares_Z[X:]))])
    shares_Z = jax.lax.stop_gradient(shares_Z)
    if config.experts_balance == "aux":
        return Z * jnp.sum(shares_Z * load.probabilities_Z) / jnp.maximum(load.tokens, 1.0)
    if config.experts_balance == "bias" and load.bias_Z is not None:
        moved_Z = load.bias_Z - jax.lax.stop_gradient(load.bias_Z)
        return jnp.sum(moved_Z * jnp.where(load.tokens > 0, shares_Z - 1 / Z, 0.0))
    return jnp.zeros((), jnp.float32)


def experts_flops(config: ModelConfig, tokens: int) -> float:
    """Operations of `experts`: the router's, and those of as many experts as a token chooses at balanced load.

    Of A choices X in Z then fall on experts that compute; null ones cost nothing.
    """
    computing = config.experts_active * config.experts / config.all_experts
    return 2.0 * tokens * config.width * (config.all_experts + computing * 3 * config.expert_width)

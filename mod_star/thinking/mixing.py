"""Mixing: how much of the prediction after a thought goes into the final one (Quiet-STaR, section 4.3), and its loss.

The cross-entropy of mixed predictions is in float32 whatever the type of the hidden states. Early in training the
mixing weight w is next to nothing, and so is what a thought changes. A mixed hidden state that is rounded to bfloat16
(8 bits) loses it: with w = 0.003, one advantage in five gets the wrong sign.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig, ThinkingConfig
from mod_star.distributed.sharding import constrain
from mod_star.model.cross_entropy import chunked, cross_entropy_by_token, head_product, unchunked
from mod_star.model.layers import Params, fan_in_normal
from mod_star.model.linear import linear
from mod_star.model.parts import Part, Parts, require_array
from mod_star.model.precision import HIGHEST, highest_products
from mod_star.model.transformer import logits_of


def mixing_weight(params: Params, base_NxD: jax.Array, thought_NxD: jax.Array) -> jax.Array:
    """The weight w of the thought's prediction, float32 N: Linear-ReLU-Linear-ReLU-Linear of both hidden states.

    Not squashed, as in the authors' code: w may leave [0, 1].
    """
    x = jnp.concatenate([base_NxD, thought_NxD], -1).astype(jnp.float32)
    x = jax.nn.relu(linear(x, params["first"], precision="highest") + params["first_bias"])
    x = jax.nn.relu(linear(x, params["second"], precision="highest") + params["second_bias"])
    return jnp.matmul(x, params["output"], precision=HIGHEST) + params["output_bias"]


def mixing_init(key: jax.Array, config: ModelConfig) -> Params:
    """Parameters of `mixing_weight`: two hidden layers and an output of zeros."""
    D = config.width
    first, second = jax.random.split(key)
    return {
        "first": fan_in_normal(first, (2 * D, D), 2 * D),
        "first_bias": jnp.zeros(D, jnp.float32),
        "second": fan_in_normal(second, (D, D), D),
        "second_bias": jnp.zeros(D, jnp.float32),
        "output": jnp.zeros(D, jnp.float32),
        "output_bias": jnp.zeros((), jnp.float32),
    }


def thought_alone(params: Params, base_NxD: jax.Array, thought_NxD: jax.Array) -> jax.Array:
    """The weight 1, float32 N: the base prediction has no share."""
    del params, base_NxD
    return jnp.ones(thought_NxD.shape[0], jnp.float32)


MIXINGS = {
    "head": Part(mixing_init, mixing_weight),
    "thought": Part(lambda key, config: {}, thought_alone, flops=lambda model, predictions: 0.0),
}
"""By `thinking.mixing`."""


def mixing_of(parts: Parts, thinking: ThinkingConfig) -> Part:
    """The mixing in force."""
    return parts.mixing or MIXINGS[thinking.mixing]


def thought_weight(
    parts: Parts, thinking: ThinkingConfig, params: dict[str, Any], base_NxD: jax.Array, thought_NxD: jax.Array
) -> jax.Array:
    """The weight of the thought's prediction by the mixing in force, float32 N.

    Args:
      parts: the model's.
      thinking: how it thinks.
      params: the model's, with the entry "thinking".
      base_NxD: hidden states without a thought.
      thought_NxD: hidden states after it.

    Raises:
      InputError: a user's mixing gives another shape or type.
    """
    with highest_products():
        weights_N = mixing_of(parts, thinking).apply(params["thinking"]["mixing"], base_NxD, thought_NxD)
    return require_array("mixing", weights_N, base_NxD.shape[:1])


def mix(base_NxD: jax.Array, thought_NxD: jax.Array, weights_N: jax.Array) -> jax.Array:
    """(1 - w)·base + w·thought, float32 NxD; exactly the base where w is 0.

    Mixing hidden states before an LM head without bias is mixing logits, vocabulary/width times cheaper. The result
    must stay float32: rounded to 16 bits, it would lose what a small w changes, and with it every reward.
    """
    base, thought = base_NxD.astype(jnp.float32), thought_NxD.astype(jnp.float32)
    return base + weights_N[:, None] * (thought - base)


def mixed_logits(
    params: dict[str, Any], base_NxD: jax.Array, thought_NxD: jax.Array, weights_N: jax.Array
) -> jax.Array:
    """Float32 logits NxV of the mixed prediction.

    Hidden states of 16 bits go through the head one by one, in exact products, and their float32 logits are mixed:
    accelerators multiply 16-bit numbers many times as fast as the float32 mix.
    """
    if base_NxD.dtype == jnp.float32:
        return logits_of(params, mix(base_NxD, thought_NxD, weights_N))
    base_NxV, thought_NxV = logits_of(params, base_NxD), logits_of(params, thought_NxD)
    return base_NxV + weights_N[:, None] * (thought_NxV - base_NxV)


def mixed_cross_entropy_by_token(
    base_BxSxD: jax.Array,
    thought_BxSxD: jax.Array,
    mixing_BxS: jax.Array,
    head_VxD: jax.Array,
    targets_BxS: jax.Array,
    weights_BxS: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy_by_token` of predictions that are mixed from two hidden states.

    Float32 hidden states are mixed before the head. Those of 16 bits go through it one by one, in exact products, and
    their float32 logits are mixed, a chunk at a time: four products with the head instead of three.

    Args:
      base_BxSxD: hidden states without a thought.
      thought_BxSxD: hidden states after it, of the same type.
      mixing_BxS: float32 weight w of the latter.
      head_VxD: float32 LM head.
      targets_BxS: int32 ids of the tokens to predict.
      weights_BxS: float32 weights in the sum; not differentiated.
      chunk: positions whose logits exist at one time.

    Returns:
      The weighted sum of the negative log-likelihoods in nats, differentiable with respect to hidden states, w and
      head; and the float32 negative log-likelihoods BxS, which carry no gradient.
    """
    if base_BxSxD.dtype == jnp.float32:
        mixed = jax.vmap(mix)(base_BxSxD, thought_BxSxD, mixing_BxS)
        return cross_entropy_by_token(mixed, head_VxD, targets_BxS, weights_BxS, chunk)
    pair = (base_BxSxD, thought_BxSxD, mixing_BxS)
    return _of_16_bits(pair, head_VxD, targets_BxS, weights_BxS, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _of_16_bits(
    pair: tuple[jax.Array, ...], head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    total, nll_BxS, _ = _scan(pair, head, targets, weights, chunk, with_gradients=False)
    return total, nll_BxS


def _scan(
    pair: tuple[jax.Array, ...], head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int,
    *, with_gradients: bool,
) -> tuple[jax.Array, jax.Array, Any]:  # fmt: skip
    """Loss, NLL by token, and if asked for gradients of the pair (their types) and of the head (float32)."""
    S, dtype = targets.shape[1], pair[0].dtype
    chunk = min(chunk, S)
    # Put together over fsdp before the loop, not in it.
    narrow = constrain(head.astype(dtype), "tensor", None)

    def one(carry: tuple[jax.Array, Any], inputs: Any) -> tuple[tuple[jax.Array, Any], Any]:
        total, grad_head = carry
        (base, thought, w), target, weight = inputs
        base_logits, thought_logits = (
            head_product("bcd,vd->bcv", h, narrow, preferred_element_type=jnp.float32) for h in (base, thought)
        )
        change = thought_logits - base_logits
        logits = base_logits + w[..., None] * change
        log_normaliser = jax.nn.logsumexp(logits, -1)
        nll = log_normaliser - jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
        total += jnp.sum(weight * nll)
        if not with_gradients:
            return (total, None), (nll, None)
        is_target = target[..., None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
        grad_logits = weight[..., None] * (jnp.exp(logits - log_normaliser[..., None]) - is_target)
        grad_w = jnp.sum(grad_logits * change, -1)
        grad_logits = grad_logits.astype(dtype)
        grad = head_product("bcv,vd->bcd", grad_logits, narrow, preferred_element_type=jnp.float32)
        grads = (((1 - w[..., None]) * grad).astype(dtype), (w[..., None] * grad).astype(dtype), grad_w)
        mixed = jax.vmap(mix)(base, thought, w).astype(dtype)
        grad_head += head_product("bcv,bcd->vd", grad_logits, mixed, preferred_element_type=jnp.float32)
        return (total, constrain(grad_head, "tensor", "fsdp")), (nll, grads)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32) if with_gradients else None)
    inputs = jax.tree.map(lambda a: chunked(a, chunk), (pair, targets, weights))
    (total, grad_head), (nll, grads) = jax.lax.scan(one, start, inputs)
    grads = jax.tree.map(lambda a: unchunked(a, S), grads)
    return total, unchunked(nll, S), (grads, grad_head)


def _forward(
    pair: tuple[jax.Array, ...], head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    total, nll, grads = _scan(pair, head, targets, weights, chunk, with_gradients=True)
    return (total, nll), grads


def _backward(chunk: int, grads: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    del chunk
    grad, _ = cotangents
    pair, head = jax.tree.map(lambda a: (a * grad).astype(a.dtype), grads)
    return pair, head, None, None


_of_16_bits.defvjp(_forward, _backward)

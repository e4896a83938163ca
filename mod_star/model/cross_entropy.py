"""Cross-entropy of the LM head without the logits of all tokens: chunk by chunk, gradients computed on the way forward.

The logits of a chunk are needed for the loss and for its gradient. Computing both while they exist costs three matrix
products with the head (logits, gradient of the hidden states, gradient of the head), where rematerialising them in
the backward pass costs four, and never holds more than B x chunk x V numbers.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.distributed.sharding import constrain
from mod_star.model.precision import precision_of


def cross_entropy(
    hidden_BxSxD: jax.Array, head_VxD: jax.Array, targets_BxS: jax.Array, weights_BxS: jax.Array, chunk: int
) -> jax.Array:
    """Sum over tokens of weight x negative log-likelihood, in nats.

    Args:
      hidden_BxSxD: final hidden states; matrix products are in their type, accumulated in float32.
      head_VxD: float32 LM head.
      targets_BxS: int32 ids of the tokens to predict.
      weights_BxS: float32 weights; not differentiated.
      chunk: positions whose logits exist at one time.

    Returns:
      A float32 scalar, differentiable with respect to hidden states and head.
    """
    return cross_entropy_by_token(hidden_BxSxD, head_VxD, targets_BxS, weights_BxS, chunk)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_by_token(
    hidden_BxSxD: jax.Array,
    head_VxD: jax.Array,
    targets_BxS: jax.Array,
    weights_BxS: jax.Array,
    chunk: int,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy`, and beside it the float32 negative log-likelihoods BxS, which carry no gradient.

    `temperature` divides the logits, in float32: hidden states of 16 bits would be rounded by it.
    """
    total, nll_BxS, _, _ = _scan(
        hidden_BxSxD, head_VxD, targets_BxS, weights_BxS, chunk, temperature, with_gradients=False
    )
    return total, nll_BxS


def token_entropy(hidden_BxSxD: jax.Array, head_VxD: jax.Array, chunk: int) -> jax.Array:
    """Entropy of each predicted distribution in nats, float32 BxS, chunk by chunk; not meant to be differentiated."""
    narrow = constrain(head_VxD.astype(hidden_BxSxD.dtype), "tensor", None)

    def one(h: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(head_product("bcd,vd->bcv", h, narrow, preferred_element_type=jnp.float32))
        return -jnp.sum(jnp.exp(log_p) * log_p, -1)

    S = hidden_BxSxD.shape[1]
    return unchunked(jax.lax.map(one, chunked(hidden_BxSxD, min(chunk, S))), S)


def chunked(a: jax.Array, chunk: int) -> jax.Array:
    """BxSx... as (count, B, chunk, ...), padded with zeros."""
    B, S, *rest = a.shape
    count = -(-S // chunk)
    padded = jnp.pad(a, [(0, 0), (0, count * chunk - S), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(padded.reshape(B, count, chunk, *rest), 1, 0)


def unchunked(a: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `chunked`."""
    count, B, chunk, *rest = a.shape
    return jnp.moveaxis(a, 0, 1).reshape(B, count * chunk, *rest)[:, :tokens]


def head_product(form: str, x: jax.Array, y: jax.Array, **options: Any) -> jax.Array:
    """An einsum of two arrays of one type; losses ask for the highest precision always."""
    return jnp.einsum(form, x, y, precision=precision_of(x.dtype), **options)


def _scan(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int, temperature: float,
    *, with_gradients: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:  # fmt: skip
    """Loss, NLL by token, and if asked for gradients of the hidden states (their type) and of the head (float32)."""
    S = hidden.shape[1]
    chunk = min(chunk, S)
    # Put together over fsdp before the loop, not in it.
    narrow = constrain(head.astype(hidden.dtype), "tensor", None)

    def one(carry: tuple[jax.Array, Any], inputs: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, Any], Any]:
        total, grad_head = carry
        h, target, weight = inputs
        logits = head_product("bcd,vd->bcv", h, narrow, preferred_element_type=jnp.float32)
        logits = logits if temperature == 1 else logits / temperature
        log_normaliser = jax.nn.logsumexp(logits, -1)
        picked = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
        nll = log_normaliser - picked
        total += jnp.sum(weight * nll)
        if not with_gradients:
            return (total, None), (nll, None)
        is_target = target[..., None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
        grad_logits = weight[..., None] * (jnp.exp(logits - log_normaliser[..., None]) - is_target)
        grad_logits = (grad_logits if temperature == 1 else grad_logits / temperature).astype(hidden.dtype)
        grad_hidden = head_product("bcv,vd->bcd", grad_logits, narrow)
        grad_head += head_product("bcv,bcd->vd", grad_logits, h, preferred_element_type=jnp.float32)
        return (total, constrain(grad_head, "tensor", "fsdp")), (nll, grad_hidden)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32) if with_gradients else None)
    inputs = tuple(chunked(a, chunk) for a in (hidden, targets, weights))
    (total, grad_head), (nll, grad_hidden) = jax.lax.scan(one, start, inputs)
    if with_gradients:
        grad_hidden = unchunked(grad_hidden, S)
    return total, unchunked(nll, S), grad_hidden, grad_head


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int, temperature: float
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    total, nll, grad_hidden, grad_head = _scan(hidden, head, targets, weights, chunk, temperature, with_gradients=True)
    return (total, nll), (grad_hidden, grad_head)


def _backward(
    chunk: int, temperature: float, residuals: tuple[jax.Array, jax.Array], grads: tuple[jax.Array, jax.Array]
) -> tuple[Any, ...]:
    del chunk, temperature
    (grad, _), (grad_hidden, grad_head) = grads, residuals
    # The factor stays float32: rounded to bfloat16 it would scale the whole model's gradient, but not the head's.
    return (grad_hidden * grad).astype(grad_hidden.dtype), grad_head * grad, None, None


cross_entropy_by_token.defvjp(_forward, _backward)

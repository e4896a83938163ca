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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
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
    return _scan(hidden_BxSxD, head_VxD, targets_BxS, weights_BxS, chunk, with_gradients=False)[0]


def _scan(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int, *, with_gradients: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Loss, and if asked for its gradients of the hidden states (their type) and of the head (float32)."""
    B, S, D = hidden.shape
    chunk = min(chunk, S)
    count = -(-S // chunk)

    def chunks(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, [(0, 0), (0, count * chunk - S), *[(0, 0)] * (a.ndim - 2)])
        return jnp.moveaxis(padded.reshape(B, count, chunk, *a.shape[2:]), 1, 0)

    narrow = head.astype(hidden.dtype)

    def one(carry: tuple[jax.Array, Any], inputs: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, Any], Any]:
        total, grad_head = carry
        h, target, weight = inputs
        logits = jnp.einsum("bcd,vd->bcv", h, narrow, preferred_element_type=jnp.float32)
        log_normaliser = jax.nn.logsumexp(logits, -1)
        picked = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
        total += jnp.sum(weight * (log_normaliser - picked))
        if not with_gradients:
            return (total, None), None
        is_target = target[..., None] == jnp.arange(logits.shape[-1])
        grad_logits = weight[..., None] * (jnp.exp(logits - log_normaliser[..., None]) - is_target)
        grad_logits = grad_logits.astype(hidden.dtype)
        grad_hidden = jnp.einsum("bcv,vd->bcd", grad_logits, narrow)
        grad_head += jnp.einsum("bcv,bcd->vd", grad_logits, h, preferred_element_type=jnp.float32)
        return (total, grad_head), grad_hidden

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32) if with_gradients else None)
    (total, grad_head), grad_hidden = jax.lax.scan(one, start, (chunks(hidden), chunks(targets), chunks(weights)))
    if with_gradients:
        grad_hidden = jnp.moveaxis(grad_hidden, 0, 1).reshape(B, count * chunk, D)[:, :S]
    return total, grad_hidden, grad_head


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[jax.Array, Any]:
    total, grad_hidden, grad_head = _scan(hidden, head, targets, weights, chunk, with_gradients=True)
    return total, (grad_hidden, grad_head)


def _backward(chunk: int, residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[Any, ...]:
    del chunk
    grad_hidden, grad_head = residuals
    # The factor stays float32: rounded to bfloat16 it would scale the whole model's gradient, but not the head's.
    return (grad_hidden * grad).astype(grad_hidden.dtype), grad_head * grad, None, None


cross_entropy.defvjp(_forward, _backward)

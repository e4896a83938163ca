"""Normalisation, rotary positions and the feed-forward layer, as pure functions of (params, arrays).

Shape suffixes here and below: N tokens (S where they are a whole sequence), D width, H query heads, K key/value heads,
E width of a head, F hidden width of the feed-forward layer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig
from mod_star.model.linear import linear

Params = dict[str, jax.Array]


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> jax.Array:
    """Float32 normal weights of standard deviation scale / sqrt(fan_in)."""
    return jax.random.normal(key, shape, jnp.float32) * (scale * fan_in**-0.5)


def rms_norm(x_NxD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """RMSNorm in float32; the result has the type of x."""
    x = x_NxD.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale_D).astype(x_NxD.dtype)


def rotary_angles(positions_N: jax.Array, head_size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding, float32 N x E/2."""
    half = head_size // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_N.astype(jnp.float32)[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_NxHxE: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) by the `rotary_angles` of the tokens' positions.

    The halves convention of Llama: pairs are (e, e + E/2). In float32; the result has the type of x.
    """
    cos, sin = (a[:, None] for a in angles)
    first, second = jnp.split(x_NxHxE.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_NxHxE.dtype)


def swiglu_init(key: jax.Array, config: ModelConfig) -> Params:
    """Parameters of `swiglu`: gate and up DxF, down FxD (scaled down with depth as in GPT-2)."""
    D, F = config.width, config.hidden_width
    gate, up, down = jax.random.split(key, 3)
    return {
        "gate": fan_in_normal(gate, (D, F), D),
        "up": fan_in_normal(up, (D, F), D),
        "down": fan_in_normal(down, (F, D), F, (2 * config.layers) ** -0.5),
    }


def swiglu(params: Params, x_NxD: jax.Array) -> jax.Array:
    """silu(x·gate) * (x·up), projected down (Shazeer 2020, arXiv 2002.05202). NxD in x's type."""
    gate, up, down = (params[name].astype(x_NxD.dtype) for name in ("gate", "up", "down"))
    return linear(jax.nn.silu(linear(x_NxD, gate)) * linear(x_NxD, up), down)

"""Normalisation, rotary positions and the feed-forward layer, as pure functions of (params, arrays).

Shape suffixes here and below: N tokens (S where they are a whole sequence), D width, H query heads, K key/value heads,
E width of a head, F hidden width of the feed-forward layer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mod_star.config import ModelConfig
from mod_star.distributed.sharding import axis_size, constrain
from mod_star.model.few_rows_cpu import rows_of, scaled
from mod_star.model.int8 import Int8Weight
from mod_star.model.linear import linear

Params = dict[str, jax.Array]


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> jax.Array:
    """Float32 normal weights of standard deviation scale / sqrt(fan_in)."""
    return jax.random.normal(key, shape, jnp.float32) * (scale * fan_in**-0.5)


def lookup(embedding_VxD: jax.Array | Int8Weight, tokens_N: jax.Array) -> jax.Array:
    """Rows NxD of an embedding. Ids beyond the vocabulary get its last row, negative ones its first.

    Where a mesh cuts up the vocabulary, each device looks up what it has, zeros for the rest, and the rows are added
    up: no device ever holds the whole embedding. Rows of an embedding in 8 bits are float32.
    """
    if isinstance(embedding_VxD, Int8Weight):
        values_DxN, scales_GxN = (
            jnp.take(array, tokens_N, axis=1, mode="clip")
            for array in (embedding_VxD.values_DxF, embedding_VxD.scales_GxF)
        )
        return scaled(values_DxN, scales_GxN).T
    V, D = embedding_VxD.shape
    cuts = axis_size("tensor")
    if cuts == 1:
        return rows_of(constrain(embedding_VxD, None, None), tokens_N)
    own_TxVxD = constrain(embedding_VxD.reshape(cuts, V // cuts, D), "tensor", None, None)
    index_TxN = jnp.clip(tokens_N, 0, V - 1) - jnp.arange(0, V, V // cuts, dtype=jnp.int32)[:, None]
    here_TxN = (index_TxN >= 0) & (index_TxN < V // cuts)
    take = lambda rows, index: jnp.take(rows, index, axis=0, mode="clip")  # noqa: E731
    return jnp.sum(jnp.where(here_TxN[..., None], jax.vmap(take)(own_TxVxD, index_TxN), 0), 0)


def rms_norm(x_NxD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """RMSNorm in float32; the result has the type of x."""
    x = x_NxD.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale_D).astype(x_NxD.dtype)


def unit_rms(x_NxD: jax.Array) -> jax.Array:
    """x in float32, each row scaled to a root mean square of 1."""
    x = x_NxD.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair, float32 E/2, scaled as `config.rope_scaling` says.

    References: Su et al. 2021 (arXiv 2104.09864); linear scaling: Chen et al. 2023 (arXiv 2306.15595); llama3: Llama
    3.1, whose scaled frequencies go linearly from divided to whole as the turns in the original context grow.
    """
    half = config.head_size // 2
    frequencies = float(config.rope_theta) ** (-np.arange(half, dtype=np.float64) / half)
    whole = np.zeros(half)  # share of each frequency that is not divided
    if config.rope_scaling == "llama3":
        turns = config.rope_original_context * frequencies / (2 * np.pi)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        whole = np.clip((turns - low) / (high - low), 0, 1)
    return (frequencies * (whole + (1 - whole) / config.rope_factor)).astype(np.float32)


def rotary_angles(positions_N: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding, float32 N x E/2."""
    angles = positions_N.astype(jnp.float32)[:, None] * rotary_frequencies(config)
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

"""A transformer block as its delta: attention plus feed-forward, without the identity path around both.

Written as a delta so that a routed block can gate it (papers: x + g(r)·f(x)) and a full block just adds it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig
from mod_star.model.attention import KeyValues, attend
from mod_star.model.experts import Load, load_of
from mod_star.model.layers import fan_in_normal, rms_norm, rotary_angles, rotate, swiglu
from mod_star.model.linear import linear
from mod_star.model.lora import with_merged
from mod_star.model.precision import products_of

if TYPE_CHECKING:
    from mod_star.model.parts import Parts


def block_init(key: jax.Array, config: ModelConfig, parts: Parts) -> dict[str, Any]:
    """Float32 parameters of `block`: query DxHxE, key and value DxKxE, output HxExD, norms D, feed_forward.

    With `config.qkv_bias` also query_bias HxE, key_bias and value_bias KxE; with `config.qk_norm` query_norm and
    key_norm E.
    """
    D, H, K, E = config.width, config.heads, config.key_heads, config.head_size
    ones, zeros = (functools.partial(full, dtype=jnp.float32) for full in (jnp.ones, jnp.zeros))
    query, key_, value, output, feed_forward = jax.random.split(key, 5)
    params: dict[str, Any] = {
        "attention_norm": ones(D),
        "query": fan_in_normal(query, (D, H, E), D),
        "key": fan_in_normal(key_, (D, K, E), D),
        "value": fan_in_normal(value, (D, K, E), D),
        "output": fan_in_normal(output, (H, E, D), H * E, (2 * config.layers) ** -0.5),
        "feed_forward_norm": ones(D),
        "feed_forward": parts.feed_forward_of(config).init(feed_forward, config),
    }
    if config.qkv_bias:
        params |= {"query_bias": zeros((H, E)), "key_bias": zeros((K, E)), "value_bias": zeros((K, E))}
    if config.qk_norm:
        params |= {"query_norm": ones(E), "key_norm": ones(E)}
    return params


def block(
    params: dict[str, Any],
    x_NxD: jax.Array,
    positions_N: jax.Array,
    segment_ids_N: jax.Array,
    valid_N: jax.Array,
    memory: tuple[KeyValues, ...],
    config: ModelConfig,
    parts: Parts,
) -> tuple[jax.Array, KeyValues] | tuple[jax.Array, KeyValues, Load]:
    """Attention over `memory` and the tokens themselves, then the feed-forward layer.

    Args:
      params: from `block_init`; matrices may be `Adapted`.
      x_NxD: residual stream of N tokens in the compute type.
      positions_N: int32 original positions (not slots): what the rotary embedding and the causal mask go by.
      segment_ids_N: int32 document ids.
      valid_N: bool; False for empty slots, which nobody attends to.
      memory: keys/values computed before, such as a cache.
      config: sizes.
      parts: supplies the feed-forward layer.

    Returns:
      The delta NxD to add to x (gated, in a routed block), and the tokens' own keys/values. From a feed-forward layer
      that chooses among experts also the valid tokens' load of them.
    """
    dtype = x_NxD.dtype
    N, D = x_NxD.shape
    h = rms_norm(x_NxD, params["attention_norm"], config.norm_eps)
    angles = rotary_angles(positions_N, config)
    query_NxHxE = _positioned(params, "query", h, angles, config)
    own = _keys_values(params, h, angles, (positions_N, segment_ids_N, valid_N), config)
    attended = attend(
        query_NxHxE, positions_N, segment_ids_N, (*memory, own),
        window=config.sliding_window, precision=config.precision, plain=config.attention == "plain",
    )  # fmt: skip
    output_HExD = params["output"].astype(dtype).reshape(-1, D)
    delta = linear(attended.reshape(N, -1), output_HExD, precision=config.precision)
    h = rms_norm(x_NxD + delta, params["feed_forward_norm"], config.norm_eps)
    feed_forward, own_layer = parts.feed_forward_of(config), params["feed_forward"]
    if feed_forward.apply is not swiglu:  # a user's own takes arrays
        own_layer = with_merged(own_layer)
    with products_of(config):
        result = feed_forward.apply(own_layer, h)
    if isinstance(result, tuple):
        result_NxD, choice = result
        return delta + result_NxD, own, load_of(choice, valid_N)
    return delta + result, own


def block_keys_values(
    params: dict[str, Any],
    x_NxD: jax.Array,
    positions_N: jax.Array,
    segment_ids_N: jax.Array,
    valid_N: jax.Array,
    config: ModelConfig,
) -> KeyValues:
    """The keys/values that `block` gives for the same arguments, without the rest of it."""
    h = rms_norm(x_NxD, params["attention_norm"], config.norm_eps)
    angles = rotary_angles(positions_N, config)
    return _keys_values(params, h, angles, (positions_N, segment_ids_N, valid_N), config)


def _keys_values(
    params: dict[str, Any], h_NxD: jax.Array, angles: tuple[jax.Array, jax.Array], tokens: Any, config: ModelConfig
) -> KeyValues:
    """Of the normalised stream; `tokens`: positions, segment ids and validity."""
    key_NxKxE = _positioned(params, "key", h_NxD, angles, config)
    value_NxKxE = _projected(params, "value", h_NxD, config)
    return KeyValues(jnp.swapaxes(key_NxKxE, 0, 1), jnp.swapaxes(value_NxKxE, 0, 1), *tokens)


def _projected(params: dict[str, Any], name: str, h_NxD: jax.Array, config: ModelConfig) -> jax.Array:
    """Query, key or value of each head, with a bias where the model has such."""
    N, D = h_NxD.shape
    weight = params[name].astype(h_NxD.dtype)
    projected = linear(h_NxD, weight.reshape(D, -1), precision=config.precision).reshape(N, *weight.shape[1:])
    return projected + params[f"{name}_bias"].astype(h_NxD.dtype) if config.qkv_bias else projected


def _positioned(
    params: dict[str, Any], name: str, h_NxD: jax.Array, angles: tuple[jax.Array, jax.Array], config: ModelConfig
) -> jax.Array:
    """Query or key of each head, normalised where the model does so, and rotated."""
    unturned = _projected(params, name, h_NxD, config)
    if config.qk_norm:
        unturned = rms_norm(unturned, params[f"{name}_norm"], config.norm_eps)
    return rotate(unturned, angles)

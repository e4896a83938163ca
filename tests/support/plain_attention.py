"""Attention as one writes it down, all scores at once: what `mod_star.model.attention.attend` is compared with."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mod_star.model.attention import KeyValues


def plain_attention(
    query_NxHxE: jax.Array,
    positions_N: jax.Array,
    segment_ids_N: jax.Array,
    segments: Sequence[KeyValues],
    window: int | None = None,
) -> jax.Array:
    """NxHxE float32; 0 for a query that sees nothing. Differentiable by JAX's own rules."""
    _, H, E = query_NxHxE.shape
    keys, values = (
        jnp.repeat(jnp.concatenate([getattr(s, name) for s in segments], 1), H // segments[0].keys_KxMxE.shape[0], 0)
        for name in ("keys_KxMxE", "values_KxMxE")
    )
    seen = []
    for s in segments:
        until = positions_N if s.until is None else jnp.minimum(positions_N, s.until)
        one = (segment_ids_N[:, None] == s.segment_ids_M) & s.valid_M & (s.positions_M <= until[:, None])
        seen.append(one if window is None else one & (positions_N[:, None] - s.positions_M < window))
    seen_NxM = jnp.concatenate(seen, 1)
    scores_HxNxM = jnp.einsum("nhe,hme->hnm", query_NxHxE, keys, precision="highest") * E**-0.5
    highest = jnp.max(jnp.where(seen_NxM, scores_HxNxM, -jnp.inf), -1, keepdims=True)
    shifted = scores_HxNxM - jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0.0))
    weights = jnp.where(seen_NxM, jnp.exp(jnp.where(seen_NxM, shifted, 0.0)), 0.0)
    total = jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return jnp.einsum("hnm,hme->nhe", weights / total, values, precision="highest")

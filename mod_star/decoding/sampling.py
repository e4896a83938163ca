"""How the next token is drawn from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mod_star.errors import require


@dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p (nucleus, Holtzman et al. 2020, arXiv 1904.09751)."""

    temperature: float = 1.0
    """Divides the logits; 0: greedy. At least 1e-6 otherwise, so that no logit overflows."""
    top_k: int = 0
    """Keep the k most probable tokens (more if several tie for the last place); 0: all."""
    top_p: float = 1.0
    """Keep the most probable tokens until their probabilities reach this sum (and those that tie with the last)."""

    def __post_init__(self) -> None:
        allowed = self.temperature == 0 or (self.temperature >= 1e-6 and math.isfinite(self.temperature))
        require(allowed, "temperature", self.temperature, "must be 0 (greedy) or at least 1e-6")
        require(self.top_k >= 0, "top_k", self.top_k, "must be 0 (off) or positive")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")


def restrict(logits_V: jax.Array, sampling: Sampling) -> jax.Array:
    """Float32 logits over the temperature, -inf for tokens that may not be drawn."""
    logits_V = logits_V.astype(jnp.float32) / sampling.temperature
    if sampling.top_k and sampling.top_k < logits_V.shape[0]:
        smallest = jax.lax.top_k(logits_V, sampling.top_k)[0][-1]
        logits_V = jnp.where(logits_V < smallest, -jnp.inf, logits_V)
    if sampling.top_p < 1:
        falling = jnp.sort(logits_V, descending=True)
        before = jnp.cumsum(jax.nn.softmax(falling)) - jax.nn.softmax(falling)
        smallest = jnp.min(jnp.where(before < sampling.top_p, falling, jnp.inf))
        logits_V = jnp.where(logits_V < smallest, -jnp.inf, logits_V)
    return logits_V


def draw(key: jax.Array, logits_V: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token, int32; the most probable one (the lowest id of several) when greedy."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_V).astype(jnp.int32)
    return jax.random.categorical(key, restrict(logits_V, sampling)).astype(jnp.int32)

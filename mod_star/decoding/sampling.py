"""How the next token is drawn from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from mod_star.decoding.largest import MANY, argmax, largest
from mod_star.errors import require
from mod_star.thinking.thought import draw_token


@dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p (nucleus, Holtzman et al. 2020, arXiv 1904.09751), then min-p (Nguyen et al.
    2024, arXiv 2407.01082): the order of transformers."""

    temperature: float = 1.0
    """Divides the logits; 0: greedy. At least 1e-6 otherwise, so that no logit overflows."""
    top_k: int = 0
    """Keep the k most probable tokens (more if several tie for the last place); 0: all."""
    top_p: float = 1.0
    """Keep the most probable tokens until their probabilities reach this sum (and those that tie with the last)."""
    min_p: float = 0.0
    """Keep the tokens that are at least this many times as probable as the most probable one; 0: all."""
    branch: bool = False
    """At the first new token branch i of a prompt takes the i-th most probable token, counted from 0, whatever the
    fields above say. With temperature 0 this is CoT-decoding (Wang and Zhou 2024, arXiv 2402.10200, section 2)."""

    def __post_init__(self) -> None:
        allowed = self.temperature == 0 or (self.temperature >= 1e-6 and math.isfinite(self.temperature))
        require(allowed, "temperature", self.temperature, "must be 0 (greedy) or at least 1e-6")
        require(self.top_k >= 0, "top_k", self.top_k, "must be 0 (off) or positive")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "must lie in [0, 1]")


GREEDY = Sampling(0.0)
BRANCHING = Sampling(0.0, branch=True)
"""CoT-decoding's."""

Numbers = tuple[jax.Array | float, jax.Array | float, jax.Array | float]
"""Temperature, top_p and min_p, where a program takes them as data."""


def compiled_for(sampling: Sampling) -> Sampling:
    """What of `sampling` a program depends on: equal for all that differ in numbers which can be data."""
    if sampling.temperature == 0:
        return Sampling(0.0, branch=sampling.branch)
    top_p, min_p = 0.5 if sampling.top_p < 1 else 1.0, 0.5 if sampling.min_p > 0 else 0.0
    return replace(sampling, temperature=1.0, top_p=top_p, min_p=min_p)


def restrict(logits_V: jax.Array, sampling: Sampling, numbers: Numbers | None = None) -> jax.Array:
    """Float32 logits over the temperature, -inf for tokens that may not be drawn.

    `numbers` take the place of those in `sampling`, which then only says whether they are in force.
    """
    if numbers is None:
        numbers = (sampling.temperature, sampling.top_p, sampling.min_p)
    temperature, top_p, min_p = numbers
    logits_V = logits_V.astype(jnp.float32) / temperature
    if sampling.top_k and sampling.top_k < logits_V.shape[0]:
        smallest = jax.lax.top_k(logits_V, sampling.top_k)[0][-1]
        logits_V = jnp.where(logits_V < smallest, -jnp.inf, logits_V)
    if sampling.top_p < 1:
        falling = jnp.sort(logits_V, descending=True)
        before = jnp.cumsum(jax.nn.softmax(falling)) - jax.nn.softmax(falling)
        smallest = jnp.min(jnp.where(before < top_p, falling, jnp.inf))
        logits_V = jnp.where(logits_V < smallest, -jnp.inf, logits_V)
    if sampling.min_p > 0:  # the ratio of two probabilities is the same whatever was kept before
        smallest = jnp.max(logits_V) + jnp.log(jnp.asarray(min_p, jnp.float32))
        logits_V = jnp.where(logits_V < smallest, -jnp.inf, logits_V)
    return logits_V


def draw(key: jax.Array, logits_V: jax.Array, sampling: Sampling, numbers: Numbers | None = None) -> jax.Array:
    """The next token, int32; the most probable one (the lowest id of several) when greedy.

    `numbers` as for `restrict`.
    """
    if sampling.temperature == 0:
        return argmax(logits_V[None])[0]
    return draw_token(key, restrict(logits_V, sampling, numbers), 1.0)


def ranked_tokens(logits_BxV: jax.Array, branches: int) -> jax.Array:
    """For branch i of each prompt the i-th most probable token, int32 B; of equal ones the lowest id comes first."""
    _, best_BxN = jax.lax.top_k(logits_BxV, branches)
    ranks_B = jnp.arange(logits_BxV.shape[0], dtype=jnp.int32) % branches
    return jnp.take_along_axis(best_BxN, ranks_B[:, None], 1)[:, 0].astype(jnp.int32)


def log_prob_and_gap(logits_BxV: jax.Array, tokens_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the tokens, and p(best token) - p(second best); float32 B, softmax over all of V.

    The gap is CoT-decoding's confidence in one token (section 2.2 of the paper).
    """
    logits_BxV = logits_BxV.astype(jnp.float32)
    highest_B = jnp.max(logits_BxV, -1)
    if logits_BxV.shape[-1] < MANY:
        second_B, own_B = _second_and_own(logits_BxV, tokens_B)
    else:
        second_B, own_B = jax.lax.platform_dependent(
            logits_BxV, tokens_B, cpu=_second_and_own_gathered, default=_second_and_own
        )
    # log_softmax of three entries alone: that of all would be written to memory and read again.
    log_sum_B = jnp.log(jnp.sum(jnp.exp(logits_BxV - highest_B[:, None]), -1))
    log_p_own_B, log_p_best_B, log_p_second_B = (
        each_B - highest_B - log_sum_B for each_B in (own_B, highest_B, second_B)
    )
    return log_p_own_B, jnp.exp(log_p_best_B) - jnp.exp(log_p_second_B)


def _second_and_own(logits_BxV: jax.Array, tokens_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The second largest logit of each row, and the token's own. By maxima: a gather takes an accelerator long."""
    numbers = jnp.arange(logits_BxV.shape[-1], dtype=jnp.int32)
    best_B = argmax(logits_BxV)
    second_B = jnp.max(jnp.where(numbers == best_B[:, None], -jnp.inf, logits_BxV), -1)
    return second_B, jnp.max(jnp.where(numbers == tokens_B[:, None], logits_BxV, -jnp.inf), -1)


def _second_and_own_gathered(logits_BxV: jax.Array, tokens_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same on a CPU, where a maximum under a condition is no loop of vectors."""
    return largest(logits_BxV, 2)[:, 1], jnp.take_along_axis(logits_BxV, tokens_B[:, None], 1)[:, 0]

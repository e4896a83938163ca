"""Reward and baseline of thoughts: what REINFORCE multiplies a thought's log-probability by (Quiet-STaR, 4.4.3).

A reward is a function of the log-likelihoods BxJxMxN of what follows M thoughts at each of J places, and of the
thoughts; see `mod_star.Parts.reward`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mod_star.config import ThinkingConfig
from mod_star.model.parts import Parts, require_array
from mod_star.thinking.thought import Thought


def above_mean(rewards_BxJxM: jax.Array) -> jax.Array:
    """Rewards less the mean over all thoughts of their place (the paper)."""
    return rewards_BxJxM - jnp.mean(rewards_BxJxM, -1, keepdims=True)


def above_others(rewards_BxJxM: jax.Array) -> jax.Array:
    """Rewards less the mean over the other thoughts of their place; 0 for a single thought."""
    M = rewards_BxJxM.shape[-1]
    advantages = above_mean(rewards_BxJxM)
    return advantages * (M / (M - 1)) if M > 1 else advantages


def mean(log_likelihoods_BxJxMxN: jax.Array, thoughts: Thought) -> jax.Array:
    """Log-likelihood of the following tokens, less its mean over all thoughts of the place; advantages BxJxM."""
    del thoughts
    return above_mean(jnp.sum(log_likelihoods_BxJxMxN, -1))


def leave_one_out(log_likelihoods_BxJxMxN: jax.Array, thoughts: Thought) -> jax.Array:
    """Log-likelihood of the following tokens, less its mean over the place's other thoughts; advantages BxJxM."""
    del thoughts
    return above_others(jnp.sum(log_likelihoods_BxJxMxN, -1))


REWARDS = {"mean": mean, "leave_one_out": leave_one_out}
"""By `thinking.baseline`."""


def advantages_of(
    parts: Parts, thinking: ThinkingConfig, log_likelihoods_BxJxMxN: jax.Array, thoughts: Thought
) -> jax.Array:
    """Advantages BxJxM by the reward in force, without gradient.

    Raises:
      InputError: a user's reward gives another shape or type.
    """
    reward = parts.reward or REWARDS[thinking.baseline]
    advantages = reward(log_likelihoods_BxJxMxN, thoughts)
    return jax.lax.stop_gradient(require_array("reward", advantages, log_likelihoods_BxJxMxN.shape[:3]))

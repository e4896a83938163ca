"""What objectives take from the choice of experts: the term that balances them, and how much each is used."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig
from mod_star.model.experts import Load, balance_loss
from mod_star.training.objectives.objective import Metrics


def expert_sums(load: Load | None, valid_BxS: jax.Array, model: ModelConfig) -> Metrics:
    """Sums of a batch that the experts' losses and metrics are ratios of, float32; none without experts.

    Per block with experts: expert_counts, how often each was chosen [blocks, X]; null_counts, the same of all null
    experts together, if there are any; balances, the balance loss of each sequence times its valid tokens.

    Args:
      load: [B, groups, blocks of a group, ...] arrays.
      valid_BxS: bool; False for padding.
      model: names the balance.
    """
    if load is None:
        return {}
    loads = jax.tree.map(lambda a: a.reshape(a.shape[0], -1, *a.shape[3:]), load)  # [B, blocks, ...]
    losses_BxL = jax.vmap(jax.vmap(functools.partial(balance_loss, config=model)))(loads)
    counts_LxZ = jnp.sum(loads.counts_Z, 0)
    experts = model.experts or counts_LxZ.shape[1]  # a user's part may have what the configuration does not know
    weights_B = jnp.sum(valid_BxS, 1, dtype=jnp.float32)
    sums = {"expert_counts": counts_LxZ[:, :experts], "balances": jnp.sum(losses_BxL * weights_B[:, None], 0)}
    if counts_LxZ.shape[1] > experts:
        sums["null_counts"] = jnp.sum(counts_LxZ[:, experts:], 1)
    return sums


def balance_term(sums: Metrics, valid: jax.Array, model: ModelConfig) -> jax.Array | float:
    """What balances the experts in a loss: `experts_weight` x mean over blocks and valid tokens of the balance loss."""
    return model.experts_weight * jnp.mean(sums["balances"]) / valid if "balances" in sums else 0.0


def expert_metrics(sums: dict[str, Any]) -> dict[str, Any]:
    """Per block, from `expert_sums` as JAX or NumPy arrays; none without experts.

    expert_load_max and expert_load_min: how often the most and the least chosen expert was chosen, as multiples of the
    experts' mean; 1 at balance. null_share: share of all choices that fell on null experts.
    """
    if "expert_counts" not in sums:
        return {}
    counts_LxX = sums["expert_counts"]
    mean_L = counts_LxX.mean(1).clip(1e-9)
    metrics = {"expert_load_max": counts_LxX.max(1) / mean_L, "expert_load_min": counts_LxX.min(1) / mean_L}
    if "null_counts" in sums:
        metrics["null_share"] = sums["null_counts"] / (sums["null_counts"] + counts_LxX.sum(1)).clip(1e-9)
    return metrics

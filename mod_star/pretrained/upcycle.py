"""Upcycling: a dense model as a Mixture-of-Depths model that computes the same, until its capacity is lowered.

Every n-th block becomes a routed one, with the dense block's weights. Its router starts with zeros, and its gate is
1 + 0.2 tanh(r): each token's gate is exactly 1. The causal predictor starts with the answer "compute it". So at
capacity 1 the model is the dense one, bit for bit, routed by top-k as well as causally.

All scores are zero at that point, and top-k would take the earliest tokens of a sequence. The gradient of the gate is
what teaches the router, and it reaches all tokens at capacity 1 only: the default plan therefore begins there, with the
router learning for which tokens a larger output of the block lowers the loss, and then halves the capacity until it is
the one that is wanted (`RoutingConfig.stages`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mod_star import random_streams
from mod_star.config import LoraConfig, RoutingConfig, RunConfig
from mod_star.errors import InputError, require
from mod_star.model.parts import DEFAULT_PARTS
from mod_star.model.routing import predictor_init
from mod_star.model.transformer import block_names, group_count
from mod_star.parts import load_parts
from mod_star.pretrained.params_run import require_free, write_params_run
from mod_star.runs.directory import load_run, read_config

PREDICTOR_SHIFT = 0.1
"""What the predictor's logit starts as: positive, so that it takes every token, and small, so that it learns to refuse
soon once it has to."""


def default_stages(capacity: float) -> tuple[float, ...]:
    """Capacities to train at before `capacity`: 1, 1/2, 1/4, ... as far as they are above it."""
    stages = []
    stage = 1.0
    while stage > capacity:
        stages.append(stage)
        stage /= 2
    return tuple(stages)


def upcycled_config(run: RunConfig, capacity: float, every: int = 2) -> RunConfig:
    """The configuration of the Mixture-of-Depths model that a dense run becomes.

    Args:
      run: the dense run. All but its routing is kept.
      capacity: share of the tokens that routed blocks are to compute in the end, in (0, 1].
      every: every n-th block is routed, 1 or more.

    Returns:
      The configuration, with the default plan of stages; `init_from` is None, and there are no adapters.

    Raises:
      InputError: the run is routed already, its blocks can't be grouped so, or its own parts decide what is routed:
        the model would not start as the dense one.
    """
    require(every >= 1, "--every", every, "must be at least 1")
    require(0 < capacity <= 1, "--capacity", capacity, "must lie in (0, 1]")
    if run.routing.every:
        raise InputError(f"routing.every = {run.routing.every}: this is a Mixture-of-Depths model already")
    layers = run.model.layers
    require(layers % every == 0, "--every", every, f"must divide model.layers = {layers}")
    parts = load_parts(run.parts)
    for name in ("router", "gate", "selection", "causal_rule"):
        if getattr(parts, name) is not getattr(DEFAULT_PARTS, name):
            raise InputError(
                f"parts = {run.parts!r}: has its own {name}; only with the built-in ones does the model start as the "
                "dense one"
            )
    routing = RoutingConfig(every=every, capacity=capacity, gate="tanh", stages=default_stages(capacity))
    return replace(run, routing=routing, lora=LoraConfig(), init_from=None)  # adapters are merged


def upcycled_params(params: dict[str, Any], run: RunConfig) -> dict[str, Any]:
    """Parameters of the Mixture-of-Depths model that equals a dense one at capacity 1.

    Args:
      params: the dense model's, float32, its blocks stacked over all layers. Entries beside the decoder's ("thinking")
        are kept.
      run: from `upcycled_config`.

    Returns:
      Float32 parameters with the blocks stacked over groups of `routing.every`.
    """
    model, routing = run.model, run.routing
    G, names = group_count(model, routing), block_names(routing)
    dense = params["groups"]["full_0"]
    # Block number g·every + i is the i-th of group g.
    groups = {
        name: jax.tree.map(lambda leaf, i=i: leaf[i :: len(names)], dense)  # type: ignore[misc]
        for i, name in enumerate(names)
    }
    keys = jax.random.split(jax.random.fold_in(jax.random.key(run.train.seed), random_streams.UPCYCLING), G)
    predictor = jax.vmap(lambda key: predictor_init(key, model, routing))(keys)
    groups["routed"] |= {
        "router": {"weight": jnp.zeros((G, model.width), jnp.float32)},
        "predictor": predictor | {"shift": jnp.full_like(predictor["shift"], PREDICTOR_SHIFT)},
    }
    return params | {"groups": groups}


def upcycle(source: Path, target: Path, capacity: float, every: int = 2, step: int | None = None) -> RunConfig:
    """Makes a dense run a Mixture-of-Depths run, to be trained on with `init_from`.

    Args:
      source: directory of the dense run.
      target: directory of the new run, which gets checkpoint 0 with the parameters.
      capacity: see `upcycled_config`.
      every: see `upcycled_config`.
      step: which checkpoint of the dense run; None: the newest.

    Returns:
      The new run's configuration, as stored.

    Raises:
      InputError: as `upcycled_config`; `source` can't be loaded, or `target` is not free. Nothing is written then.
    """
    run = upcycled_config(read_config(source), capacity, every)
    require_free(target)
    dense = load_run(source, step)
    return write_params_run(target, run, dense.tokenizer, upcycled_params(dense.params, run))

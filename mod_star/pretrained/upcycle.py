"""Upcycling: a dense model as a Mixture-of-Depths model that computes the same, until its capacity is lowered.

Every n-th block becomes a routed one, with the dense block's weights. Its router starts with zeros, and its gate is
1 + 0.2 tanh(r): each token's gate is exactly 1. The causal predictor starts with the answer "compute it". So at
capacity 1 the model is the dense one, bit for bit, routed by top-k as well as causally.

Two things make a skipped block cost less (`Skipping`): tokens that pass by may keep their keys and values, and an
adapter may stand in for the block. With a text, routers, predictors and adapters are fitted to what the dense blocks do
to it (`mod_star.pretrained.calibration`). Then the model starts at the capacity that is wanted, without stages, and is
no longer the dense one.

Without a text all scores are zero at first, and top-k would take the earliest tokens of a sequence. The gradient of the
gate is what teaches the router, and it reaches all tokens at capacity 1 only: the default plan therefore begins there,
with the router learning for which tokens a larger output of the block lowers the loss, and then halves the capacity
until it is the one that is wanted (`RoutingConfig.stages`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mod_star import random_streams
from mod_star.config import DataConfig, LoraConfig, RoutingConfig, RunConfig
from mod_star.errors import InputError, require
from mod_star.model.parts import DEFAULT_PARTS
from mod_star.model.routing import predictor_init
from mod_star.model.skip_path import adapter_init
from mod_star.model.transformer import block_names, group_count, routed_blocks
from mod_star.parts import load_parts
from mod_star.pretrained.calibration import block_changes, fit_block, fitted_params, least_changed, read_streams
from mod_star.pretrained.params_run import require_free, write_params_run
from mod_star.runs.directory import load_run, read_config

PREDICTOR_SHIFT = 0.1
"""What the predictor's logit starts as: positive, so that it takes every token, and small, so that it learns to refuse
soon once it has to."""


@dataclass(frozen=True)
class Skipping:
    """What an upcycled model does for tokens that pass by its routed blocks, and which blocks these are."""

    blocks: Literal["last", "least-changed"] = "last"
    """last: the last block of each group of `every`. least-changed: of the layouts without the first and the last
    block the one whose routed blocks change a text the least; needs `text`."""
    keep_key_values: bool = False
    """As `RoutingConfig.keep_key_values`."""
    adapter_rank: int = 0
    """As `RoutingConfig.adapter_rank`."""
    text: DataConfig | None = None
    """Text that routers, predictors and adapters are fitted to; its held-out part is not read. None: they are not."""
    tokens: int = 8192
    """Tokens of the text to read, at least as many as the model is wide. (layers + 1) · tokens · width float32 numbers
    are kept in memory."""


NO_SKIPPING = Skipping()


def default_stages(capacity: float) -> tuple[float, ...]:
    """Capacities to train at before `capacity`: 1, 1/2, 1/4, ... as far as they are above it."""
    stages = []
    stage = 1.0
    while stage > capacity:
        stages.append(stage)
        stage /= 2
    return tuple(stages)


def upcycled_config(
    run: RunConfig, capacity: float, every: int = 2, skipping: Skipping = NO_SKIPPING, first: int | None = None
) -> RunConfig:
    """The configuration of the Mixture-of-Depths model that a dense run becomes.

    Args:
      run: the dense run. All but its routing is kept.
      capacity: share of the tokens that routed blocks are to compute in the end, in (0, 1].
      every: every n-th block is routed, 1 or more.
      skipping: what is done for tokens that pass by.
      first: the first routed block, counted from 1; None: `every`.

    Returns:
      The configuration, with the default plan of stages, or none where a text is given; `init_from` is None, and there
      is no LoRA.

    Raises:
      InputError: the run is routed already, its blocks can't be grouped so, or its own parts decide what is routed:
        the model would not start as the dense one.
    """
    require(every >= 1, "--every", every, "must be at least 1")
    require(0 < capacity <= 1, "--capacity", capacity, "must lie in (0, 1]")
    require(skipping.adapter_rank >= 0, "--adapter-rank", skipping.adapter_rank, "must be at least 0")
    if skipping.text is None:
        allowed = "must be last without --text, which tells how much each block changes"
        require(skipping.blocks == "last", "--blocks", skipping.blocks, allowed)
    else:
        width = run.model.width
        require(skipping.tokens >= width, "--tokens", skipping.tokens, f"must be at least model.width = {width}")
    if run.routing.every:
        raise InputError(f"routing.every = {run.routing.every}: this is a Mixture-of-Depths model already")
    layers = run.model.layers
    require(layers % every == 0, "--every", every, f"must divide model.layers = {layers}")
    parts = load_parts(run.parts)
    own_block = parts.block is not DEFAULT_PARTS.block
    allowed = "cannot be given with parts.block of your own"
    require(not (skipping.keep_key_values and own_block), "--keep-key-values", True, allowed)
    for name in ("router", "gate", "selection", "causal_rule", "adapter"):
        if getattr(parts, name) is not getattr(DEFAULT_PARTS, name):
            raise InputError(
                f"parts = {run.parts!r}: has its own {name}; only with the built-in ones does the model start as the "
                "dense one"
            )
    routing = RoutingConfig(
        every=every,
        first=first,
        capacity=capacity,
        gate="tanh",
        stages=default_stages(capacity) if skipping.text is None else (),
        keep_key_values=skipping.keep_key_values,
        adapter_rank=skipping.adapter_rank,
        router_norm=skipping.text is not None,
    )
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
    if routing.adapter_rank:
        skip = jax.vmap(lambda key: adapter_init(jax.random.fold_in(key, random_streams.SKIP_PATH), model, routing))
        groups["routed"]["adapter"] = skip(keys)
    return params | {"groups": groups}


def upcycle(
    source: Path,
    target: Path,
    capacity: float,
    every: int = 2,
    step: int | None = None,
    skipping: Skipping = NO_SKIPPING,
) -> RunConfig:
    """Makes a dense run a Mixture-of-Depths run, to be trained on with `init_from`.

    Args:
      source: directory of the dense run.
      target: directory of the new run, which gets checkpoint 0 with the parameters.
      capacity: see `upcycled_config`.
      every: see `upcycled_config`.
      step: which checkpoint of the dense run; None: the newest.
      skipping: see `upcycled_config`.

    Returns:
      The new run's configuration, as stored.

    Raises:
      InputError: as `upcycled_config`; `source` can't be loaded, or `target` is not free. Nothing is written then.
    """
    run = upcycled_config(read_config(source), capacity, every, skipping)
    require_free(target)
    dense = load_run(source, step)
    if skipping.text is None:
        return write_params_run(target, run, dense.tokenizer, upcycled_params(dense.params, run))
    streams = read_streams(dense, skipping.text, skipping.tokens)
    if skipping.blocks == "least-changed":
        first = least_changed(block_changes(streams), every)
        run = upcycled_config(read_config(source), capacity, every, skipping, first)
    params = with_fitted(upcycled_params(dense.params, run), run, streams)
    return write_params_run(target, run, dense.tokenizer, params)


def with_fitted(params: dict[str, Any], run: RunConfig, streams: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Upcycled parameters with routers, predictors and adapters that are fitted to what the dense blocks do.

    Args:
      params: from `upcycled_params`.
      run: from `upcycled_config`, with a text.
      streams: of the dense model, from `mod_star.pretrained.calibration.read_streams`.
    """
    routing, routed = run.routing, params["groups"]["routed"]
    blocks, rank = routed_blocks(run.model, routing), routing.adapter_rank
    fits = [fit_block(streams[block], streams[block + 1], routing.capacity, rank) for block in blocks]
    return params | {"groups": params["groups"] | {"routed": routed | fitted_params(fits, routed, rank)}}

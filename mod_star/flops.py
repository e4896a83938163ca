"""Floating-point operations of a model, counted from its configuration: two per multiply-add of every matrix product.

Elementwise work is left out, as is usual; at the sizes of real models the count agrees with the compiled program's own
within 5 % (tests/test_flops.py). A routed block is counted at its capacity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig, RoutingConfig, RunConfig
from mod_star.model.parts import DEFAULT_PARTS, Part, Parts
from mod_star.model.routing import capacity_of
from mod_star.model.transformer import block_names, group_count
from mod_star.parts import load_parts


@dataclass(frozen=True)
class Flops:
    """Operations by kind."""

    projections: float = 0.0
    """Query, key, value and output projections of attention."""
    attention: float = 0.0
    """Products of queries with keys and of weights with values (the whole square: a mask saves nothing)."""
    mlp: float = 0.0
    """Feed-forward layers."""
    router: float = 0.0
    """Router scores of all tokens."""
    predictor: float = 0.0
    """The causal predictor."""
    head: float = 0.0
    """Logits."""

    @property
    def total(self) -> float:
        """All kinds together."""
        return sum(dataclasses.astuple(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(a * factor for a in dataclasses.astuple(self)))


def forward_flops(model: ModelConfig, routing: RoutingConfig, tokens: int, parts: Parts = DEFAULT_PARTS) -> Flops:
    """One forward pass over one sequence of `tokens` tokens, logits included.

    Parts of the user's own are counted by XLA's analysis of the function; a block of their own counts as `mlp`.
    """
    D, V = model.width, model.vocab_size
    full = _block_flops(model, parts, tokens)
    group = Flops()
    for name in block_names(routing):
        if name == "routed":
            group += _block_flops(model, parts, capacity_of(routing, tokens))
            group += Flops(router=_router_flops(model, parts, tokens))
            if routing.selection == "learned" and routing.causal_rule == "predictor":
                P = routing.predictor_width
                group += Flops(predictor=2.0 * tokens * (D * P + P))
        else:
            group += full
    return group * group_count(model, routing) + Flops(head=2.0 * tokens * D * V)


def training_flops(model: ModelConfig, routing: RoutingConfig, tokens: int, parts: Parts = DEFAULT_PARTS) -> Flops:
    """Forward and backward pass over one sequence, with what `model.remat` recomputes.

    A backward pass costs twice the forward pass; the predictor's once, since its input is detached.
    """
    forward = forward_flops(model, routing, tokens, parts)
    step = forward * 3
    step = dataclasses.replace(step, predictor=2 * forward.predictor)
    if model.remat == "full":
        step += dataclasses.replace(forward, head=0.0)
        if routing.every == 0 and parts == DEFAULT_PARTS:
            # The last product of a group is not needed again, but for a gate's gradient: here, every block's down.
            step += Flops(mlp=-forward.mlp / 3)
    elif model.remat == "dots":
        step += Flops(attention=forward.attention)
    return step


def training_step_flops(run: RunConfig, parts: Parts | None = None) -> float:
    """Operations of one optimizer step of a run (AdamW's own, a few per parameter, are left out)."""
    parts = load_parts(run.parts) if parts is None else parts
    return training_flops(run.model, run.routing, run.model.context, parts).total * run.train.batch_size


def parameter_count(params: object) -> int:
    """Number of elements of a pytree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _block_flops(model: ModelConfig, parts: Parts, tokens: int) -> Flops:
    D, H, K, E = model.width, model.heads, model.key_heads, model.head_size
    if parts.block is not DEFAULT_PARTS.block:
        ids = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        valid = jax.ShapeDtypeStruct((tokens,), jnp.bool_)
        params = jax.eval_shape(lambda key: parts.block.init(key, model, parts), jax.random.key(0))
        x = jax.ShapeDtypeStruct((tokens, D), model.dtype)
        return Flops(mlp=_analysed(lambda *a: parts.block.apply(*a, (), model, parts), params, x, ids, ids, valid))
    if parts.feed_forward is DEFAULT_PARTS.feed_forward:
        mlp = 2.0 * tokens * 3 * D * model.hidden_width
    else:
        mlp = _part_flops(parts.feed_forward, model, tokens, model.dtype)
    return Flops(
        projections=2.0 * tokens * D * E * (2 * H + 2 * K),
        attention=2.0 * 2 * tokens**2 * H * E,
        mlp=mlp,
    )


def _router_flops(model: ModelConfig, parts: Parts, tokens: int) -> float:
    if parts.router is DEFAULT_PARTS.router:
        return 2.0 * tokens * model.width
    return _part_flops(parts.router, model, tokens, model.dtype)


def _part_flops(part: Part, model: ModelConfig, tokens: int, dtype: str) -> float:
    params = jax.eval_shape(lambda key: part.init(key, model), jax.random.key(0))
    return _analysed(part.apply, params, jax.ShapeDtypeStruct((tokens, model.width), dtype))


def _analysed(function: Callable[..., Any], *shapes: Any) -> float:
    analysis: Any = jax.jit(function).lower(*shapes).cost_analysis()
    return float(analysis["flops"])

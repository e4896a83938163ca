"""Floating-point operations of a model, counted from its configuration: two per multiply-add of every matrix product.

Elementwise work is left out, as is usual; at the sizes of real models the count agrees with the compiled program's own
within 5 % (tests/test_flops.py). A routed block is counted at its capacity, experts at balanced load: of the choices of
a token, null experts have their share, and cost nothing. A user's parts are counted by
`mod_star.function_flops`, unless they say themselves what they take (`Part.flops`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.config import ModelConfig, RoutingConfig, RunConfig
from mod_star.function_flops import function_flops
from mod_star.model.attention import KeyValues
from mod_star.model.parts import DEFAULT_PARTS, LatentInput, Part, Parts
from mod_star.model.routing import capacity_of, causal_slots, routed_share
from mod_star.model.transformer import Decoder, block_names, group_count
from mod_star.parts import load_parts
from mod_star.thinking.decider import decider_flops
from mod_star.thinking.mixing import MIXINGS, mixing_of
from mod_star.thinking.objective import place_count
from mod_star.thinking.parameters import thinking_init
from mod_star.thinking.sample import thought_slots
from mod_star.thinking.thought import expected_embedding, last_hidden, latent_input
from mod_star.trained_share import ALL_TRAINED, TrainedShare, trained_share


@dataclass(frozen=True)
class Flops:
    """Operations by kind."""

    projections: float = 0.0
    """Query, key, value and output projections of attention."""
    attention: float = 0.0
    """Products of queries with keys and of weights with values (the whole square: a mask saves nothing)."""
    mlp: float = 0.0
    """Feed-forward layers; of experts with their router."""
    router: float = 0.0
    """Router scores of all tokens, and a user's selection."""
    predictor: float = 0.0
    """The causal rule: the predictor, or a user's rule."""
    head: float = 0.0
    """Logits."""
    mixing: float = 0.0
    """The mixing head and the decider of a thinking model."""
    adapters: float = 0.0
    """Low-rank adapters of blocks in training."""
    skip: float = 0.0
    """Adapters of the skip path, which compute every token: shapes are static."""

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

    A user's block counts as `mlp`.

    Raises:
      InputError: the layers don't fit `routing.every`, or operations of a user's part can't be counted.
    """
    D, V = model.width, model.vocab_size
    full = _block_flops(model, parts, tokens)
    group = Flops()
    for name in block_names(routing):
        if name == "routed":
            computed = capacity_of(routing, tokens)
            kept = tokens * routing.keep_key_values
            group += _block_flops(model, parts, computed, computed + kept) + _skip_flops(model, routing, parts, tokens)
            group += Flops(projections=kept * _key_value_flops(model))
            group += Flops(router=_router_flops(model, parts, tokens) + _selection_flops(routing, parts, tokens))
            group += Flops(predictor=_rule_flops(model, routing, parts, tokens))
        else:
            group += full
    return group * group_count(model, routing) + Flops(head=2.0 * tokens * D * V)


def training_flops(
    model: ModelConfig,
    routing: RoutingConfig,
    tokens: int,
    parts: Parts = DEFAULT_PARTS,
    trained: TrainedShare = ALL_TRAINED,
) -> Flops:
    """Forward and backward pass over one sequence, with what `model.remat` recomputes.

    A backward pass costs twice the forward pass; the predictor's once, since its input is detached; frozen weights'
    once, too.
    """
    forward = _with_adapters(forward_flops(model, routing, tokens, parts), trained)
    again = _recomputed(model, parts, forward, _share_of_full(routing, tokens, capacity_of(routing, tokens)))
    return _forward_and_backward(forward, parts, trained) + again * trained.through_blocks


def sampling_flops(run: RunConfig, tokens: int, parts: Parts = DEFAULT_PARTS) -> Flops:
    """Sampling the thoughts of one sequence of `tokens` tokens, `run.thinking.think_fraction` of whose positions think.

    Routed blocks are counted at their capacity, attention at all keys there are slots for. The pass over the text is
    not counted: it is part of `scoring_flops`.
    """
    model, routing, thinking = run.model, run.routing, run.thinking
    if latent_input(parts, thinking) is not None:  # whose steps run while they are scored
        return Flops()
    count = place_count(thinking, tokens) * thinking.n_thoughts * thinking.thought_length
    share = routed_share(routing, model.context)
    own = thinking.thought_length + 1
    blocks = _groups_flops(model, routing, parts, count, tokens + own, share * count, _text_slots(run, tokens) + own)
    silent = parts.thought is None and thinking.kind == "pause"
    head = 0.0 if silent else 2.0 * count * model.width * model.vocab_size
    return _with_adapters(blocks, trained_share(run, parts)) + Flops(head=head)


def scoring_flops(run: RunConfig, tokens: int, parts: Parts = DEFAULT_PARTS) -> Flops:
    """Forward and backward pass over one sequence and over all of its thoughts with what follows them.

    With what `model.remat` recomputes.
    """
    model, routing, thinking, trained = run.model, run.routing, run.thinking, trained_share(run, parts)
    D, V, t, n_true = model.width, model.vocab_size, thinking.thought_length, thinking.n_true
    thoughts = place_count(thinking, tokens) * thinking.n_thoughts
    N = t + 1 + n_true
    slots, text_slots = thought_slots(routing, thinking), _text_slots(run, tokens)
    latent = latent_input(parts, thinking)
    predictions = n_true + (t if thinking.policy_weight > 0 and latent is None else 0)
    forward = Flops(head=2.0 * thoughts * predictions * D * V, mixing=_mixing_flops(run, parts, thoughts * n_true))
    steps = Flops()
    if latent is None:
        forward += _groups_flops(model, routing, parts, thoughts * N, tokens + N, thoughts * slots, text_slots + slots)
    else:  # the last input, <end> and what follows are one pass after the steps
        routed, rest = min(slots, n_true + 1), n_true + 1
        forward += _groups_flops(
            model, routing, parts, thoughts * rest, tokens + N, thoughts * routed, text_slots + t + routed
        )
        steps = _latent_flops(model, routing, parts, latent, (thoughts * t, tokens + t + 1, text_slots + t + 1))
        forward += steps
    forward += _groups_flops(model, routing, parts, tokens, tokens, text_slots, text_slots)
    forward += Flops(head=2.0 * tokens * D * V)
    steps, forward = _with_adapters(steps, trained), _with_adapters(forward, trained)
    step = _forward_and_backward(forward, parts, trained)
    if thinking.decider_width:  # whose input is detached
        deciding = decider_flops(model, thinking.decider_width, place_count(thinking, tokens))
        step += Flops(mixing=(1 + trained.of("mixing")) * deciding)
    if model.dtype != "float32":  # two products' logits are mixed, see `mod_star.thinking.mixing`
        step += Flops(head=2.0 * thoughts * n_true * D * V)
    share = _share_of_full(routing, thoughts * N + tokens, thoughts * slots + text_slots)
    again = steps + _recomputed(model, parts, forward, share)  # a backward pass computes the steps again
    return step + again * trained.through_blocks


def training_step_flops(run: RunConfig, parts: Parts | None = None) -> float:
    """Operations of one optimizer step of a run (AdamW's own, a few per parameter, left out).

    They are of `routing.capacity` and `thinking.thought_length`; `mod_star.stages` counts each stage at its own.
    """
    parts = load_parts(run.parts) if parts is None else parts
    tokens = run.model.context
    if run.thinks and run.thinking.thought_length > 0:
        sequence = sampling_flops(run, tokens, parts) + scoring_flops(run, tokens, parts)
    else:
        sequence = training_flops(run.model, run.routing, tokens, parts, trained_share(run, parts))
    return sequence.total * run.train.batch_size


def parameter_count(params: object) -> int:
    """Number of elements of a pytree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _forward_and_backward(forward: Flops, parts: Parts, trained: TrainedShare) -> Flops:
    """Of each product the forward pass, the gradient of its input, and that of its weight as far as it is trained.

    The gradient of the built-in predictor's input is not needed: it is detached. A user's own rule may not be.
    """
    blocks = int(trained.through_blocks)
    inputs = {field.name: blocks for field in dataclasses.fields(Flops)}
    inputs |= {"predictor": blocks if parts.causal_rule is not None else 0}
    inputs |= {"head": int(trained.to_hidden), "mixing": int(trained.to_hidden)}
    weights = {name: trained.of(name) for name in inputs} | {"attention": blocks}  # whose two operands are no weights
    return Flops(*(value * (1 + inputs[name] + weights[name]) for name, value in dataclasses.asdict(forward).items()))


def _with_adapters(forward: Flops, trained: TrainedShare) -> Flops:
    """The forward pass of blocks with their adapters: as many tokens go through these as through the weights."""
    return dataclasses.replace(forward, adapters=trained.adapters * (forward.projections + forward.mlp))


def _share_of_full(routing: RoutingConfig, rows: float, routed_rows: float) -> float:
    """Share of the rows that full blocks compute, of those of all blocks.

    Args:
      routing: of the model.
      rows: of a full block.
      routed_rows: of a routed block.
    """
    names = block_names(routing)
    routed = names.count("routed")
    full = (len(names) - routed) * rows
    return full / (full + routed * routed_rows)


def _recomputed(model: ModelConfig, parts: Parts, forward: Flops, share_of_full: float) -> Flops:
    """What the backward pass computes a second time of this forward pass, by `model.remat`."""
    if model.remat == "full":
        again = dataclasses.replace(forward, head=0.0, mixing=0.0)
        own = parts.block is not DEFAULT_PARTS.block or parts.feed_forward_of(model) is not DEFAULT_PARTS.feed_forward
        if not own:
            # The last product of a block, down, is not needed again, but for a routed block's gate.
            again += Flops(mlp=-share_of_full * forward.mlp / 3)
        return again
    return Flops(attention=forward.attention) if model.remat == "dots" else Flops()


def _text_slots(run: RunConfig, tokens: int) -> int:
    """Slots of a routed block in a pass over the text that is routed causally."""
    return causal_slots(run.routing, tokens) if run.routing.every else 0


def _groups_flops(
    model: ModelConfig, routing: RoutingConfig, parts: Parts, tokens: int, keys: int, routed: float, routed_keys: int
) -> Flops:
    """All blocks, for `tokens` tokens that attend to `keys` keys each, of which routed blocks compute `routed`."""
    group = Flops()
    for name in block_names(routing):
        if name == "routed":
            one = _block_flops(model, parts, 1, routed_keys)
            group += one * routed + _skip_flops(model, routing, parts, 1) * tokens
            group += Flops(router=_router_flops(model, parts, 1) * tokens)
            group += Flops(predictor=_rule_flops(model, routing, parts, 1) * tokens)
        else:
            group += _block_flops(model, parts, 1, keys) * tokens
    return group * group_count(model, routing)


def _latent_flops(
    model: ModelConfig, routing: RoutingConfig, parts: Parts, latent: LatentInput, counts: tuple[int, int, int]
) -> Flops:
    """Steps of latent thoughts, forward. `counts`: steps, keys that each attends to, and those of routed blocks.

    Routed blocks compute every step. What a thought reads next is counted as `head`.
    """
    steps, keys, routed_keys = counts
    D, V = model.width, model.vocab_size
    if latent.feed_back is last_hidden:
        each = 0.0
    elif latent.feed_back is expected_embedding:
        each = 2.0 * 2 * D * V
    else:
        params = jax.eval_shape(lambda: _latent_params(model, routing, parts))
        each = function_flops("thought.feed_back", latent.feed_back, params, jax.ShapeDtypeStruct((D,), model.dtype))
    return _groups_flops(model, routing, parts, steps, keys, steps, routed_keys) + Flops(head=steps * each)


def _latent_params(model: ModelConfig, routing: RoutingConfig, parts: Parts) -> dict[str, Any]:
    """Parameters that a user's `feed_back` may read."""
    key = jax.random.key(0)
    params = dict(Decoder(model, routing, parts).init(key, jnp.zeros(2, jnp.int32))["params"])
    return params | {"thinking": thinking_init(key, model, params["embedding"], [0], [0], parts)}


def _block_flops(model: ModelConfig, parts: Parts, tokens: int, keys: int | None = None) -> Flops:
    """A block for `tokens` tokens that attend to `keys` keys each; None: to one another."""
    D, H, K, E = model.width, model.heads, model.key_heads, model.head_size
    if parts.block is not DEFAULT_PARTS.block:
        return Flops(mlp=_own_block_flops(model, parts, tokens, tokens if keys is None else keys))
    feed_forward = parts.feed_forward_of(model)
    if feed_forward is DEFAULT_PARTS.feed_forward:
        mlp = 2.0 * tokens * 3 * D * model.hidden_width
    else:
        mlp = _part_flops("parts.feed_forward", feed_forward, model, tokens)
    return Flops(
        projections=2.0 * tokens * D * E * (2 * H + 2 * K),
        attention=2.0 * 2 * tokens * (tokens if keys is None else keys) * H * E,
        mlp=mlp,
    )


def _key_value_flops(model: ModelConfig) -> float:
    """Keys and values of one token in one block."""
    return 2.0 * model.width * model.head_size * 2 * model.key_heads


def _skip_flops(model: ModelConfig, routing: RoutingConfig, parts: Parts, tokens: int) -> Flops:
    """The adapter of the skip path, if there is one."""
    part = parts.adapter_of(routing)
    if part is None:
        return Flops()
    if part.flops is not None:
        return Flops(skip=part.flops(model, tokens, routing))
    params = jax.eval_shape(lambda key: part.init(key, model, routing), jax.random.key(0))
    x = jax.ShapeDtypeStruct((tokens, model.width), model.dtype)
    return Flops(skip=function_flops("parts.adapter", part.apply, params, x))


def _own_block_flops(model: ModelConfig, parts: Parts, tokens: int, keys: int) -> float:
    """A user's block for `tokens` tokens that attend to `keys` keys each, their own included."""
    if parts.block.flops is not None:
        return parts.block.flops(model, tokens, keys)
    ids, valid = (jax.ShapeDtypeStruct((tokens,), dtype) for dtype in (jnp.int32, jnp.bool_))
    params = jax.eval_shape(lambda key: parts.block.init(key, model, parts), jax.random.key(0))
    x = jax.ShapeDtypeStruct((tokens, model.width), model.dtype)

    def apply(params: Any, x: jax.Array, ids: jax.Array, valid: jax.Array, memory: Any) -> Any:
        return parts.block.apply(params, x, ids, ids, valid, memory, model, parts)

    before: tuple[KeyValues, ...] = ()
    if keys > tokens:  # as many more, in the shapes of the block's own
        own = jax.eval_shape(apply, params, x, ids, valid, ())[1]

        def longer(leaf: Any, axis: int) -> Any:
            return jax.ShapeDtypeStruct((*leaf.shape[:axis], keys - tokens, *leaf.shape[axis + 1 :]), leaf.dtype)

        keys_values, where = (own.keys_KxMxE, own.values_KxMxE), (own.positions_M, own.segment_ids_M, own.valid_M)
        before = (KeyValues(*(longer(leaf, 1) for leaf in keys_values), *(longer(leaf, 0) for leaf in where)),)
    return function_flops("parts.block", apply, params, x, ids, valid, before)


def _router_flops(model: ModelConfig, parts: Parts, tokens: int) -> float:
    if parts.router is DEFAULT_PARTS.router:
        return 2.0 * tokens * model.width
    return _part_flops("parts.router", parts.router, model, tokens)


def _mixing_flops(run: RunConfig, parts: Parts, rows: int) -> float:
    """Mixing of `rows` predictions."""
    model, part = run.model, mixing_of(parts, run.thinking)
    D = model.width
    if part is MIXINGS["head"]:
        return 2.0 * rows * (3 * D * D + D)
    if part.flops is not None:
        return part.flops(model, rows)
    params = jax.eval_shape(lambda key: part.init(key, model), jax.random.key(0))
    hidden = jax.ShapeDtypeStruct((rows, D), model.dtype)
    return function_flops("mixing", part.apply, params, hidden, hidden)


def _selection_flops(routing: RoutingConfig, parts: Parts, tokens: int) -> float:
    """A user's own selection; the built-in ones compare and sort, which is left out."""
    if parts.selection is None:
        return 0.0
    shape, dtypes = (tokens,), (jnp.float32, jnp.bool_, jnp.float32)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes]

    def select(scores: jax.Array, valid: jax.Array, noise: jax.Array) -> Any:
        return parts.select(scores, valid, routing, lambda: noise)

    return function_flops("parts.selection", select, *arrays)


def _rule_flops(model: ModelConfig, routing: RoutingConfig, parts: Parts, tokens: int) -> float:
    rule = parts.causal_rule_of(routing)
    if rule.flops is not None:
        return rule.flops(model, tokens, routing)
    params = jax.eval_shape(lambda key: rule.init(key, model, routing), jax.random.key(0))
    x = jax.ShapeDtypeStruct((tokens, model.width), model.dtype)
    scores = jax.ShapeDtypeStruct((tokens,), jnp.float32)

    def decide(params: Any, x: jax.Array, scores: jax.Array, noise: jax.Array) -> Any:
        return rule.apply(params, x, scores, lambda: noise, routing, model.context)

    return function_flops("parts.causal_rule", decide, params, x, scores, scores)


def _part_flops(name: str, part: Part, model: ModelConfig, tokens: int) -> float:
    if part.flops is not None:
        return part.flops(model, tokens)
    params = jax.eval_shape(lambda key: part.init(key, model), jax.random.key(0))
    return function_flops(name, part.apply, params, jax.ShapeDtypeStruct((tokens, model.width), model.dtype))

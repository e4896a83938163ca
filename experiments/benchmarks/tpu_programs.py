"""Programs of training, decoding and thinking, lowered for one TPU chip that need not be there.

Shapes stand for arrays: nothing is computed, and no parameters are made. `prepare_environment` of
`mod_star.planning.topologies` must have been called before JAX was imported.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from mod_star.config import RunConfig
from mod_star.decoding import programs
from mod_star.decoding.sampling import Sampling
from mod_star.decoding.think import NEVER, Think
from mod_star.model import Decoder
from mod_star.model.cross_entropy import cross_entropy
from mod_star.model.product_weights import narrow_types
from mod_star.model.transformer import group_count, head_matrix
from mod_star.planning.hlo import Array, Computation, Instruction, Program
from mod_star.planning.program_cost import branches_of
from mod_star.thinking.objective import choose_places, sample_thoughts, talk_loss
from mod_star.thinking.sample import ThinkingDecoder
from mod_star.tokenization import ByteTokenizer
from mod_star.training.lowering import batch_shapes, lower_train_step, state_shapes
from mod_star.training.objectives.next_token import forward

STEPS = 100
ROOM = 128
"""Slots for new tokens in decoding; prompts fill the rest of a context."""


def placed(tree: Any, device: jax.Device) -> Any:
    """Shapes and types of a pytree, on a device."""
    where = SingleDeviceSharding(device)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def train_step(run: RunConfig, device: jax.Device) -> jax.stages.Lowered:
    """A whole training step, optimizer included."""
    decoder = Decoder(run.model, run.routing)
    state = placed(state_shapes(decoder, run, ByteTokenizer(), STEPS), device)
    return lower_train_step(decoder, run, STEPS, state)


def forward_pass(run: RunConfig, device: jax.Device) -> jax.stages.Lowered:
    """The loss of a batch, routed as in training."""
    decoder = Decoder(run.model, run.routing)

    def loss(params: Any, batch: Any) -> jax.Array:
        hidden = forward(decoder, params, batch, None, "top_k").hidden
        return cross_entropy(hidden, head_matrix(params), batch["targets"], batch["weights"], run.train.loss_chunk)

    return jax.jit(loss).lower(_params(decoder, run, device), placed(batch_shapes(run), device))


def _params(decoder: Decoder, run: RunConfig, device: jax.Device) -> Any:
    return placed(state_shapes(decoder, run, ByteTokenizer(), STEPS).params, device)


def _decoding_params(decoder: Decoder, run: RunConfig, device: jax.Device) -> Any:
    """As `own_params` makes them: unrolled, and narrow as `narrow_types` says."""
    shapes = state_shapes(decoder, run, ByteTokenizer(), STEPS).params
    typed = jax.tree.map(
        lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes, narrow_types(decoder, shapes)
    )  # fmt: skip
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), typed["groups"])
    return placed({**typed, "groups": (one,) * group_count(run.model, run.routing)}, device)


def _traced_prefill(run: RunConfig, batch: int, device: jax.Device) -> tuple[Any, Any]:
    """The prefill, traced, and the shapes of the parameters that decoding takes."""
    decoder = Decoder(run.model, run.routing)
    length = run.model.context - ROOM
    rows, number = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompts = programs.Prompts(tokens, rows, jax.ShapeDtypeStruct((batch,), jnp.uint32), number, number, key)
    params = _decoding_params(decoder, run, device)
    thinking = run.thinking if run.thinks else None
    program: Any = jax.jit(programs.prefill, static_argnames=("decoder", "thinking", "size"))  # all groups in one
    size = programs.Size(length, ROOM)
    return program.trace(decoder, thinking, params, placed(prompts, device), None, size=size), params


def prefill(run: RunConfig, batch: int, device: jax.Device) -> jax.stages.Lowered:
    """A batch of prompts that fill the context but for `ROOM` tokens."""
    lowered: jax.stages.Lowered = _traced_prefill(run, batch, device)[0].lower()
    return lowered


def decode(run: RunConfig, batch: int, device: jax.Device, think: Think = NEVER) -> tuple[jax.stages.Lowered, Any]:
    """The loop over new tokens, after `prefill`; and the shapes of its caches."""
    traced, params = _traced_prefill(run, batch, device)
    decoder, state = Decoder(run.model, run.routing), placed(traced.out_info, device)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    bounds = programs.Bounds(
        jax.ShapeDtypeStruct((), jnp.int32), number, number, number, number, jax.ShapeDtypeStruct((8,), jnp.int32)
    )  # fmt: skip
    # No compiler options of this machine's CPU, which `programs.advance_program` would ask for.
    advance = jax.jit(
        programs._advance, static_argnames=("decoder", "thinking", "sampling", "think"), donate_argnames=("state",)
    )
    thinking = run.thinking if run.thinks else None
    arrays = (params, state, placed(bounds, device), None)
    lowered = advance.lower(decoder, thinking, *arrays, sampling=Sampling(1.0), think=think)
    return lowered, state.caches


def sampling(run: RunConfig, device: jax.Device) -> jax.stages.Lowered:
    """The first half of a Quiet-STaR step: a pass over the text, and thoughts."""
    lowered: jax.stages.Lowered = _traced_sampling(run, device)[0].lower()
    return lowered


def _traced_sampling(run: RunConfig, device: jax.Device) -> tuple[Any, Any, Any]:
    decoder = Decoder(run.model, run.routing)
    thinker, chunk = ThinkingDecoder(decoder, run.thinking), run.train.loss_chunk

    def sample(params: Any, batch: Any, key: jax.Array) -> Any:
        text = forward(decoder, params, batch, None, "causal", keep_keys_values=True)
        places = choose_places(thinker, batch, text, head_matrix(params), key, chunk)
        return places, sample_thoughts(thinker, params, text, batch, places, key, temperature=1.0)

    params, batch = _params(decoder, run, device), placed(batch_shapes(run), device)
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), device)
    return jax.jit(sample).trace(params, batch, key), params, batch


def scoring(run: RunConfig, device: jax.Device) -> jax.stages.Lowered:
    """The other half: the gradient of the objective, given the thoughts."""
    decoder = Decoder(run.model, run.routing)
    thinker, chunk = ThinkingDecoder(decoder, run.thinking), run.train.loss_chunk

    def score(params: Any, batch: Any, places: Any, thoughts: Any) -> Any:
        def loss(params: Any) -> Any:
            text = forward(decoder, params, batch, None, "causal", keep_keys_values=True)
            return talk_loss(thinker, params, text, batch, places, thoughts, chunk)[0]

        return jax.grad(loss)(params)

    traced, params, batch = _traced_sampling(run, device)
    return jax.jit(score).lower(params, batch, *placed(traced.out_info, device))


def cache_writes(program: Program, body: str, caches: Any) -> list[Instruction]:
    """Instructions in a loop's body that write as much as a whole cache: copies, and updates that are not in place.

    Args:
      program: compiled.
      body: name of the loop's body; what it calls is searched as well.
      caches: of the decoding state; arrays or their shapes.
    """
    leaves = [leaf for leaf in jax.tree.leaves(caches) if leaf.ndim == 4]
    shapes = {tuple(sorted(size for size in leaf.shape if size > 1)) for leaf in leaves}

    def is_cache(array: Array) -> bool:
        return tuple(sorted(size for size in array.dims if size > 1)) in shapes and array.dtype in ("bf16", "f32")

    found: list[Instruction] = []
    computation = program.computations[body]
    for instruction in computation.instructions.values():
        called = branches_of(instruction) if instruction.opcode == "conditional" else []
        called += [name for key in ("body", "to_apply") if (name := instruction.attribute(key))]
        for name in called:
            found += cache_writes(program, name, caches)
        if instruction.opcode in ("copy", "transpose"):
            found += [instruction] if is_cache(instruction.arrays[0]) else []
        elif instruction.opcode == "copy-start":  # into VMEM it is a reading
            found += [instruction] if is_cache(instruction.arrays[0]) and instruction.arrays[0].in_hbm else []
        elif instruction.opcode == "fusion":
            inner = program.computations[instruction.attribute("calls") or ""]
            found += [instruction] if any(is_cache(a) for root in _written_anew(inner) for a in root.arrays) else []
    return found


def _written_anew(inner: Computation) -> list[Instruction]:
    """Results of a fusion that are no update of an operand in place."""
    roots = [inner.root]
    if inner.root.opcode == "tuple":
        roots = [inner.instructions[name] for name in inner.root.operands]
    roots = [inner.viewed(root) for root in roots]
    return [root for root in roots if root.opcode not in ("dynamic-update-slice", "scatter", "parameter", "fusion")]

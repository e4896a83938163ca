"""Main memory of one chip, by what lies in it."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mod_star.config import RunConfig
from mod_star.training.lowering import batch_shapes
from mod_star.training.state import TrainState


@dataclass(frozen=True)
class Memory:
    """Bytes by kind, of one chip; None is not known."""

    parameters: float
    """The chip's share of the float32 parameters."""
    optimizer: float
    """Its share of the optimizer's state: both moments of AdamW."""
    batch: float
    """Its sequences, the random key and counters, and what the layout of all arguments adds to them."""
    activations: float | None = None
    """What loops of the forward pass keep for the backward pass."""
    temporaries: float | None = None
    """All else that a step needs for a while: gradients, gathered parameters, logits of a chunk, copies."""
    results: float | None = None
    """New values that don't take the place of old ones."""
    code: float | None = None
    """The program itself."""

    @property
    def total(self) -> float:
        """All that is known together."""
        return sum(value or 0.0 for value in astuple(self))


def arguments(state: TrainState, run: RunConfig, mesh: Mesh) -> Memory:
    """What a step is given, by the shares that the mesh cuts it into.

    Args:
      state: shapes and shardings, from `mod_star.training.lowering.state_shapes`.
      run: for its batch.
      mesh: where it lies.
    """
    rest = (state.step, state.key, state.skipped, state.streak)
    return Memory(
        share_bytes(state.params), share_bytes(state.opt_state), share_bytes((rest, batch_shapes(run, mesh)))
    )  # fmt: skip


def share_bytes(tree: Any) -> float:
    """Bytes of one chip's share of arrays, from their shapes, types and shardings."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        total += math.prod(shape) * (8 if key else leaf.dtype.itemsize)
    return total


def memory_of(analysis: Any, arguments: Memory, activations: float) -> Memory:
    """Memory of a compiled program.

    Args:
      analysis: `jax.stages.Compiled.memory_analysis()`.
      arguments: what the step is given, from `arguments`.
      activations: bytes of the activations, from `mod_star.planning.program_cost`.
    """
    activations = min(activations, float(analysis.temp_size_in_bytes))
    return Memory(
        parameters=arguments.parameters,
        optimizer=arguments.optimizer,
        batch=max(0.0, analysis.argument_size_in_bytes - arguments.parameters - arguments.optimizer),
        activations=activations,
        temporaries=analysis.temp_size_in_bytes - activations,
        results=max(0.0, float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes)),
        code=float(analysis.generated_code_size_in_bytes),
    )

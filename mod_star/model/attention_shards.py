"""Attention on a mesh by something that the compiler cannot cut up: each device computes its own rows and heads.

Sequences lie on data and fsdp, heads on tensor (`mod_star.distributed.sharding`). No device needs another's: rows that
share keys lie together, and so do heads of queries that share one of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mod_star.distributed.sharding import BATCH_AXES, LETTERS
from mod_star.model.attention_whole import Memory, Queries


def _axes(mesh: AbstractMesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that rows and heads lie on, but for those that a `shard_map` around has cut up already."""
    names = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    return tuple(axis for axis in BATCH_AXES if axis in names), tuple({LETTERS["K"]} & names)


def divides(mesh: AbstractMesh, memory: Memory) -> bool:
    """Whether the mesh divides a memory's entries and its key heads."""
    C, K = memory.keys_CxKxMxE.shape[:2]
    rows, heads = (math.prod(mesh.shape[axis] for axis in axes) for axes in _axes(mesh))
    return C % rows == 0 and K % heads == 0


def sharded(mesh: AbstractMesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of queries, a memory and arrays BxKxGxN..., computed by each device for its own rows and heads.

    Args:
      mesh: whose sizes the arrays' are multiples of, see `divides`.
      function: of those; gives arrays BxKxGxN... or CxK....
    """
    rows, heads = _axes(mesh)
    of_rows, of_heads = PartitionSpec(rows), PartitionSpec(rows, heads)
    queries = Queries(of_heads, of_rows, of_rows)  # type: ignore[arg-type]  # where each array lies
    memory = Memory(of_heads, of_heads, of_rows, of_rows, of_rows)  # type: ignore[arg-type]

    def each(*operands: Any) -> Any:
        places = (queries, memory, *[of_heads] * (len(operands) - 2))
        return jax.shard_map(
            function, mesh=mesh, axis_names={*rows, *heads}, in_specs=places, out_specs=of_heads, check_vma=False
        )(*operands)

    return each if rows or heads else function

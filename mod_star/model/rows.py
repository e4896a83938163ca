"""Computing some rows of many and skipping the rest, with static shapes: what makes routing save work token by token.

`lax.cond` under `vmap` becomes a `select` that computes both branches, so skipping has to be said to `vmap` itself:
the rows that are wanted are gathered into chunks of a fixed size, as many chunks as it takes. Exact (no row is dropped
for want of a slot), and no chunk at all where no row is wanted. Not differentiable in reverse once batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mod_star.distributed.sharding import most_of_all

FEW_ROWS = 256
"""So many rows at most are compared in pairs to find those of a chunk: work that grows as their square."""


def rows_at_once(rows: int, share: float) -> int:
    """Rows of a chunk: a little above the number of wanted rows to expect, so that one chunk mostly does."""
    return min(rows, math.ceil(1.5 * share * rows) + 1)


def compute_rows(
    function: Callable[..., Any], needed_R: jax.Array, rows: Any, share: float, one_chunk: bool = False
) -> Any:
    """`function(*rows)` for the rows that are wanted, zeros for the others.

    Args:
      function: takes any number of rows at once; the results' leading axis is theirs.
      needed_R: bool.
      rows: a tuple of pytrees whose leaves have R as leading axis.
      share: about how large a part of the rows is wanted; sets the size of a chunk, not the result.
      one_chunk: as for `in_chunks`.
    """
    shapes = jax.eval_shape(function, *rows)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if needed_R.shape[0] == 1:  # a branch that is not taken reads no weights
        return jax.lax.cond(needed_R[0], lambda: function(*rows), lambda: zeros)

    def chunk(picked: Picked, results: Any) -> Any:
        return picked.put(results, function(*picked.of(rows)))

    return in_chunks(chunk, needed_R, zeros, share, one_chunk)


@struct.dataclass
class Picked:
    """Rows of a chunk, C of R: wanted ones, and any others where too few are left."""

    rows_C: jax.Array
    """int32 numbers of them."""
    needed_C: jax.Array
    """bool; whether the row is wanted."""
    here_R: jax.Array
    """bool; the wanted rows of the chunk."""
    place_R: jax.Array
    """int32 place in the chunk of those."""

    def of(self, rows: Any) -> Any:
        """What the chunk has of a pytree whose leaves have R as leading axis."""
        return jax.tree.map(lambda leaf: leaf[self.rows_C], rows)

    def put(self, results: Any, new: Any) -> Any:
        """Results of all rows, with those of the chunk's wanted rows.

        By a gather: XLA:CPU does a scatter row by row.
        """

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(self.here_R.reshape(-1, *[1] * (old.ndim - 1)), new[self.place_R], old)

        return jax.tree.map(put, results, new)


def in_chunks(
    function: Callable[[Picked, Any], Any], needed_R: jax.Array, carry: Any, share: float, one_chunk: bool = False
) -> Any:
    """Calls `function(picked, carry)`, which gives the next carry, with as many chunks as hold the wanted rows.

    Devices that have rows of their own (`for_own_rows`) take as many as the one with most wanted rows.

    Args:
      function: of the rows of a chunk.
      needed_R: bool.
      carry: before the first chunk.
      share: as for `compute_rows`.
      one_chunk: never more rows are wanted than a chunk holds (`rows_at_once`). Then it is computed in any case, and
        nothing depends on data: a GPU would ask its host after each chunk whether there is another.
    """
    R = needed_R.shape[0]
    chunk = rows_at_once(R, share)
    place_R = jnp.cumsum(needed_R, dtype=jnp.int32) - 1  # of a needed row among those
    count = place_R[-1] + 1
    numbers_C = jnp.arange(chunk, dtype=jnp.int32)
    order_R = None if R <= FEW_ROWS else jnp.pad(jnp.argsort(~needed_R).astype(jnp.int32), (0, chunk))  # needed first

    def body(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        start, carry = state
        slot_R = jnp.clip(place_R - start, 0, chunk - 1)
        here_R = needed_R & (place_R - start == slot_R)
        if order_R is None:  # an accelerator takes longer to start a sort or a gather than to compare all pairs
            at_CxR = here_R & (slot_R == numbers_C[:, None])
            rows_C = jnp.sum(jnp.where(at_CxR, jnp.arange(R, dtype=jnp.int32), 0), -1, dtype=jnp.int32)
        else:
            rows_C = jax.lax.dynamic_slice(order_R, (start,), (chunk,))
        picked = Picked(rows_C, start + numbers_C < count, here_R, slot_R)
        return start + chunk, function(picked, carry)

    if one_chunk:
        return body((jnp.zeros((), count.dtype), carry))[1]
    most = most_of_all(count)
    return jax.lax.while_loop(lambda state: state[0] < most, body, (jnp.zeros((), count.dtype), carry))[1]


def compute_if(
    needed: jax.Array, function: Callable[..., Any], args: Any, share: float, one_chunk: bool = False
) -> Any:
    """`function(*args)` if `needed`, else zeros; under `vmap`, however deep, only the needed rows are computed.

    Args:
      needed: bool scalar.
      function: pure; closes over no array.
      args: a tuple of pytrees. What `vmap` doesn't batch is shared by all rows and never copied.
      share: as for `compute_rows`.
      one_chunk: as for `in_chunks`, of each pool of rows: those that share what isn't batched.
    """
    leaves, tree = jax.tree.flatten(args)
    function = jax.jit(function)  # traced once, for all the programs below that contain it

    @jax.custom_batching.custom_vmap
    def one(needed: jax.Array, *leaves: jax.Array) -> Any:
        values = jax.tree.unflatten(tree, leaves)
        shapes = jax.eval_shape(function, *values)
        zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # noqa: E731
        return jax.lax.cond(needed, lambda: function(*values), zeros)

    @one.def_vmap
    def many(axis_size: int, in_batched: Sequence[bool], needed: jax.Array, *leaves: jax.Array) -> tuple[Any, Any]:
        is_needed_batched, *is_row = in_batched
        needed_R = needed if is_needed_batched else jnp.broadcast_to(needed, axis_size)
        rows = [leaf for leaf, row in zip(leaves, is_row, strict=True) if row]
        shared = [leaf for leaf, row in zip(leaves, is_row, strict=True) if not row]

        def several(rows: Sequence[jax.Array], shared: Sequence[jax.Array]) -> Any:
            """The function for many rows at once, leaves in the order of `args`."""
            iterators = iter(rows), iter(shared)
            mixed = [next(iterators[not row]) for row in is_row]
            axes = [0 if row else None for row in is_row]
            return jax.vmap(lambda *each: function(*jax.tree.unflatten(tree, each)), axes)(*mixed)

        result = _pooled(several, share, one_chunk)(needed_R, rows, shared)
        return result, jax.tree.map(lambda _: True, result)

    return one(needed, *leaves)


def _pooled(several: Callable[..., Any], share: float, one_chunk: bool) -> Callable[..., Any]:
    """`compute_rows` of one pool of rows, which a further `vmap` makes larger where the shared leaves stay shared."""

    def plain(needed_R: jax.Array, rows: list[jax.Array], shared: list[jax.Array]) -> Any:
        return compute_rows(lambda *some: several(some, shared), needed_R, tuple(rows), share, one_chunk)

    pooled = jax.custom_batching.custom_vmap(plain)

    @pooled.def_vmap
    def larger(axis_size: int, in_batched: Any, needed_R: jax.Array, rows: Any, shared: Any) -> tuple[Any, Any]:
        if any(in_batched[2]):
            axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
            result = jax.vmap(plain, axes)(needed_R, rows, shared)
        else:
            R = needed_R.shape[-1]

            def flat(leaf: jax.Array, batched: bool) -> jax.Array:
                leaf = leaf if batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
                return leaf.reshape(axis_size * R, *leaf.shape[2:])

            result = pooled(flat(needed_R, in_batched[0]), jax.tree.map(flat, rows, in_batched[1]), shared)
            result = jax.tree.map(lambda leaf: leaf.reshape(axis_size, R, *leaf.shape[1:]), result)
        return result, jax.tree.map(lambda _: True, result)

    return pooled

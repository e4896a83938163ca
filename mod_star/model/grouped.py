"""`grouped_linear(x, weights, group)`: each row times the matrix of its own group, exact, whatever the groups' sizes.

The products of a mixture of experts. The network is written for one sequence and `vmap`ped; left to itself, `vmap`
would sort the rows of every sequence apart, and make a gradient of all weights for each. These are JAX primitives with
rules of their own, as `mod_star.model.linear` is: a batch of inputs becomes more rows of the same groups.

On TPUs the sorted rows go through `jax.lax.ragged_dot`. Elsewhere that multiplies every row by every matrix (on a CPU,
with 8 groups, it takes 8 to 12 times as long as one product: experiments/benchmarks/grouped.py), so there the rows are
cut up into blocks of one group each, and a loop runs over the blocks that there are. Rows of no group cost nothing.

R rows, G groups, D and F the sides of a matrix.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mod_star.distributed.sharding import BATCH_AXES, LETTERS
from mod_star.model.precision import precision_of

grouped_p = Primitive("grouped_linear")
outer_p = Primitive("grouped_outer")
LARGEST_BLOCK = 256
"""Rows of a block at most: enough that reading a matrix takes no time beside the product."""


def grouped_linear(x_RxD: jax.Array, weights_GxDxF: jax.Array, group_R: jax.Array) -> jax.Array:
    """x[r] @ weights[group[r]], RxF in x's type, accumulated in float32; also differentiable and vmappable.

    Args:
      x_RxD: rows.
      weights_GxDxF: of the same type. What `jax.default_matmul_precision` says around the call holds for float32.
      group_R: int32 number of each row's matrix; of a row with another number than 0, ..., G - 1 the result is zero.
    """
    if x_RxD.ndim != 2 or weights_GxDxF.ndim != 3 or x_RxD.shape[1] != weights_GxDxF.shape[1]:
        raise TypeError(f"grouped_linear takes RxD and GxDxF, got {x_RxD.shape} and {weights_GxDxF.shape}")
    if x_RxD.dtype != weights_GxDxF.dtype:
        raise TypeError(f"grouped_linear takes two arrays of one type, got {x_RxD.dtype} and {weights_GxDxF.dtype}")
    mesh = jax.sharding.get_abstract_mesh()
    precision = precision_of(x_RxD.dtype, None)
    where = None if mesh.empty else mesh
    return grouped_p.bind(x_RxD, weights_GxDxF, group_R, transposed=False, precision=precision, mesh=where)


class Blocks(NamedTuple):
    """Rows in the order of their groups, cut up into blocks of one group each."""

    order_R: jax.Array
    """int32 rows in that order; those of no group last."""
    starts_H: jax.Array
    """int32 place of each group's first row, and the number of all rows of groups; [G + 1]."""
    ends_G: jax.Array
    """int32 number of blocks of this group and those before it."""
    slot_R: jax.Array
    """int32 place of each row among the blocks' rows, one after the other; meaningless for rows of no group."""


def block_size(rows: int, groups: int) -> int:
    """Rows of a block: a power of two. Few empty rows at a block's end, and few readings of the same matrix."""
    mean = rows / groups
    size = mean if mean <= 16 else max(16.0, mean / 4)
    return min(LARGEST_BLOCK, 2 ** max(0, math.ceil(math.log2(size))))


def most_blocks(rows: int, groups: int, size: int) -> int:
    """The most blocks that so many rows can make, whatever their groups."""
    return min(rows, (rows + groups * (size - 1)) // size)


def cut_up(group_R: jax.Array, groups: int, size: int) -> Blocks:
    """The blocks of `size` rows of each group."""
    group_R = jnp.where((group_R >= 0) & (group_R < groups), group_R, groups)
    order_R = jnp.argsort(group_R).astype(jnp.int32)  # stable
    place_R = jnp.argsort(order_R).astype(jnp.int32)
    starts_H = jnp.searchsorted(group_R[order_R], jnp.arange(groups + 1, dtype=jnp.int32)).astype(jnp.int32)
    blocks_G = (starts_H[1:] - starts_H[:-1] + size - 1) // size
    ends_G = jnp.cumsum(blocks_G, dtype=jnp.int32)
    own_R = jnp.minimum(group_R, groups - 1)
    slot_R = (ends_G - blocks_G)[own_R] * size + place_R - starts_H[own_R]
    return Blocks(order_R, starts_H, ends_G, slot_R)


def _rows_of_block(blocks: Blocks, index: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Group of a block, its rows, and whether each is one."""
    group = jnp.searchsorted(blocks.ends_G, index, side="right").astype(jnp.int32)
    before = jnp.where(group > 0, blocks.ends_G[group - 1], 0)
    place = blocks.starts_H[group] + (index - before) * size + jnp.arange(size, dtype=jnp.int32)
    row = blocks.order_R[jnp.minimum(place, blocks.order_R.shape[0] - 1)]
    return group, row, place < blocks.starts_H[group + 1]


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int], precision: Any) -> jax.Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def in_blocks(x: jax.Array, weights: jax.Array, group: jax.Array, *, transposed: bool, precision: Any) -> jax.Array:
    """`grouped_linear` by a loop over the blocks."""
    rows, groups = x.shape[0], weights.shape[0]
    size = block_size(rows, groups)
    blocks = cut_up(group, groups, size)
    padded = 2 if size == 1 and x.dtype != jnp.float32 else size  # XLA:CPU is slow with a single 16-bit row
    results = jnp.zeros((most_blocks(rows, groups, size) * size, weights.shape[1 if transposed else 2]), x.dtype)

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, results = state
        own, row, is_row = _rows_of_block(blocks, index, size)
        block = jnp.pad(jnp.where(is_row[:, None], x[row], 0), ((0, padded - size), (0, 0)))
        weight = jax.lax.dynamic_index_in_dim(weights, own, keepdims=False)
        product = _dot(block, weight, (1, int(transposed)), precision)[:size].astype(x.dtype)
        return index + 1, jax.lax.dynamic_update_slice(results, product, (index * size, jnp.int32(0)))

    _, results = jax.lax.while_loop(lambda s: s[0] < blocks.ends_G[-1], body, (jnp.int32(0), results))
    is_grouped = (group >= 0) & (group < groups)
    return jnp.where(is_grouped[:, None], results[jnp.clip(blocks.slot_R, 0, results.shape[0] - 1)], 0)


def outer_in_blocks(x: jax.Array, y: jax.Array, group: jax.Array, *, groups: int, precision: Any) -> jax.Array:
    """For each group the sum of its rows' x[r]·y[r]ᵀ: float32 GxDxF, by a loop over the blocks."""
    size = block_size(x.shape[0], groups)
    blocks = cut_up(group, groups, size)

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, sums = state
        own, row, is_row = _rows_of_block(blocks, index, size)
        block_x, block_y = (jnp.where(is_row[:, None], a[row], 0) for a in (x, y))
        product = _dot(block_x, block_y, (0, 0), precision)
        old = jax.lax.dynamic_index_in_dim(sums, own)
        return index + 1, jax.lax.dynamic_update_index_in_dim(sums, old + product, own, 0)

    sums = jnp.zeros((groups, x.shape[1], y.shape[1]), jnp.float32)
    return jax.lax.while_loop(lambda s: s[0] < blocks.ends_G[-1], body, (jnp.int32(0), sums))[1]


def _sorted(group: jax.Array, groups: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rows in the order of their groups, the inverse of that order, which rows are of a group, and groups' sizes."""
    blocks = cut_up(group, groups, 1)  # where a row's slot is its place
    is_grouped = (group >= 0) & (group < groups)
    return blocks.order_R, jnp.where(is_grouped, blocks.slot_R, 0), is_grouped, jnp.diff(blocks.starts_H)


def ragged(x: jax.Array, weights: jax.Array, group: jax.Array, *, transposed: bool, precision: Any) -> jax.Array:
    """`grouped_linear` by `jax.lax.ragged_dot`."""
    order, place, is_grouped, sizes = _sorted(group, weights.shape[0])
    weights = jnp.swapaxes(weights, 1, 2) if transposed else weights
    product = jax.lax.ragged_dot(x[order], weights, sizes, precision, jnp.float32).astype(x.dtype)
    return jnp.where(is_grouped[:, None], product[place], 0)


def outer_ragged(x: jax.Array, y: jax.Array, group: jax.Array, *, groups: int, precision: Any) -> jax.Array:
    """`outer_in_blocks` by `jax.lax.ragged_dot_general`, whose contracted dimension is the ragged one."""
    order, _, is_grouped, sizes = _sorted(group, groups)
    x = jnp.where(is_grouped[:, None], x, 0)
    dimensions = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(
        x[order], y[order], sizes, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


# On a mesh each device computes its own rows, with its own experts: rows lie on data and fsdp, groups on tensor.


def _free(mesh: AbstractMesh) -> set[str]:
    """The axes that no `shard_map` around has cut up already."""
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}


def _axes(mesh: AbstractMesh, rows: int, groups: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that rows and groups are cut up among; none where they do not divide them."""
    of_rows = tuple(axis for axis in BATCH_AXES if axis in _free(mesh))
    of_groups = tuple({LETTERS["X"]} & _free(mesh))
    return (
        of_rows if rows % math.prod(mesh.shape[axis] for axis in of_rows) == 0 else (),
        of_groups if groups % math.prod(mesh.shape[axis] for axis in of_groups) == 0 else (),
    )


def _own_groups(group: jax.Array, groups: int, axes: tuple[str, ...]) -> jax.Array:
    """Numbers among the `groups` that this device has; those of others lie outside of them."""
    return group - jax.lax.axis_index(axes[0]) * groups if axes else group


def _product(
    x: jax.Array, weights: jax.Array, group: jax.Array, *, transposed: bool, precision: Any, mesh: Any, way: Any
) -> jax.Array:
    if mesh is None or not _free(mesh):
        return way(x, weights, group, transposed=transposed, precision=precision)
    rows, experts = _axes(mesh, x.shape[0], weights.shape[0])

    def own(x: jax.Array, weights: jax.Array, group: jax.Array) -> jax.Array:
        group = _own_groups(group, weights.shape[0], experts)
        product = way(x, weights, group, transposed=transposed, precision=precision)
        return jax.lax.psum(product, experts) if experts else product

    of_rows, of_experts = PartitionSpec(rows), PartitionSpec(experts)
    return jax.shard_map(
        own, mesh=mesh, axis_names=_free(mesh), in_specs=(of_rows, of_experts, of_rows), out_specs=of_rows,
        check_vma=False,
    )(x, weights, group)  # fmt: skip


def _outer(
    x: jax.Array, y: jax.Array, group: jax.Array, *, groups: int, dtype: Any, precision: Any, mesh: Any, way: Any
) -> jax.Array:
    if mesh is None or not _free(mesh):
        return way(x, y, group, groups=groups, precision=precision).astype(dtype)
    rows, experts = _axes(mesh, x.shape[0], groups)
    held = groups // math.prod(mesh.shape[axis] for axis in experts)

    def own(x: jax.Array, y: jax.Array, group: jax.Array) -> jax.Array:
        sums = way(x, y, _own_groups(group, held, experts), groups=held, precision=precision)
        return (jax.lax.psum(sums, rows) if rows else sums).astype(dtype)

    of_rows = PartitionSpec(rows)
    return jax.shard_map(
        own, mesh=mesh, axis_names=_free(mesh), in_specs=of_rows, out_specs=PartitionSpec(experts), check_vma=False
    )(x, y, group)


# Rules.


def _shape(x: ShapedArray, weights: ShapedArray, group: ShapedArray, *, transposed: bool, **_: Any) -> ShapedArray:
    del group
    return ShapedArray((x.shape[0], weights.shape[1 if transposed else 2]), x.dtype)


def _outer_shape(
    x: ShapedArray, y: ShapedArray, group: ShapedArray, *, groups: int, dtype: Any, **_: Any
) -> ShapedArray:
    del group
    return ShapedArray((groups, x.shape[1], y.shape[1]), dtype)


def _front(operand: jax.Array, dim: int | None, size: int) -> jax.Array:
    """The operand with the batch as leading axis."""
    return jnp.broadcast_to(operand, (size, *operand.shape)) if dim is None else jnp.moveaxis(operand, dim, 0)


def _size(operands: Any, dims: Any) -> int:
    return next(operand.shape[dim] for operand, dim in zip(operands, dims, strict=True) if dim is not None)


def _pooled(size: int, groups: int, group: jax.Array, apart: bool) -> jax.Array:
    """Groups of all rows of a batch of so many, where each has groups of its own, or all have the same."""
    if not apart:
        return group.reshape(-1)
    is_grouped = (group >= 0) & (group < groups)
    first = jnp.arange(size, dtype=group.dtype)[:, None] * groups
    return jnp.where(is_grouped, group + first, size * groups).reshape(-1)


def _batch(operands: Any, dims: Any, **params: Any) -> tuple[jax.Array, int]:
    (x, weights, group), apart, size = operands, dims[1] is not None, _size(operands, dims)
    x, group = _front(x, dims[0], size), _front(group, dims[2], size)
    groups = weights.shape[0]
    if apart:
        weights = jnp.moveaxis(weights, dims[1], 0)
        groups = weights.shape[1]
        weights = weights.reshape(size * groups, *weights.shape[2:])
    rows = grouped_p.bind(x.reshape(-1, x.shape[-1]), weights, _pooled(size, groups, group, apart), **params)
    return rows.reshape(size, -1, rows.shape[-1]), 0


def _batch_outer(operands: Any, dims: Any, *, groups: int, **params: Any) -> tuple[jax.Array, int]:
    size = _size(operands, dims)
    x, y, group = (_front(operand, dim, size) for operand, dim in zip(operands, dims, strict=True))
    x, y = (each.reshape(-1, each.shape[-1]) for each in (x, y))
    sums = outer_p.bind(x, y, _pooled(size, groups, group, True), groups=size * groups, **params)
    return sums.reshape(size, groups, *sums.shape[1:]), 0


def _transpose(grad: Any, x: Any, weights: Any, group: Any, *, transposed: bool, precision: Any, mesh: Any) -> Any:
    if ad.is_undefined_primal(x):
        grad_x = grouped_p.bind(
            grad.astype(weights.dtype), weights, group, transposed=not transposed, precision=precision, mesh=mesh
        )
        return grad_x, None, None
    pair = (grad.astype(x.dtype), x) if transposed else (x, grad.astype(x.dtype))
    groups, dtype = weights.aval.shape[0], weights.aval.dtype
    return None, outer_p.bind(*pair, group, groups=groups, dtype=dtype, precision=precision, mesh=mesh), None


def _transpose_outer(
    grad: Any, x: Any, y: Any, group: Any, *, groups: int, dtype: Any, precision: Any, mesh: Any
) -> Any:
    del groups, dtype
    params = {"precision": precision, "mesh": mesh}
    if ad.is_undefined_primal(x):
        return grouped_p.bind(y, grad.astype(y.dtype), group, transposed=True, **params), None, None
    return None, grouped_p.bind(x, grad.astype(x.dtype), group, transposed=False, **params), None


def _register(primitive: Primitive, function: Any, static: tuple[str, ...], ways: dict[str | None, Any]) -> None:
    """Rules for evaluation, derivatives and platforms of one of the two: each is linear in its first two."""
    bind = functools.partial
    at_once = jax.jit(bind(function, way=ways[None]), static_argnames=static)
    primitive.def_impl(at_once)
    for platform, way in ways.items():
        lowering = mlir.lower_fun(bind(function, way=way), multiple_results=False)
        mlir.register_lowering(primitive, lowering, platform=platform)
    ad.defjvp(
        primitive,
        lambda tangent, _, y, group, **params: primitive.bind(tangent, y, group, **params),
        lambda tangent, x, _, group, **params: primitive.bind(x, tangent, group, **params),
        None,
    )


def grouped_saveable(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """A `jax.checkpoint` policy: keep the results of `grouped_linear`, recompute the rest."""
    return primitive is grouped_p


_register(grouped_p, _product, ("transposed", "precision", "mesh"), {None: in_blocks, "tpu": ragged})
_register(outer_p, _outer, ("groups", "dtype", "precision", "mesh"), {None: outer_in_blocks, "tpu": outer_ragged})
grouped_p.def_abstract_eval(_shape)
outer_p.def_abstract_eval(_outer_shape)
batching.primitive_batchers[grouped_p] = _batch
batching.primitive_batchers[outer_p] = _batch_outer
ad.primitive_transposes[grouped_p] = _transpose
ad.primitive_transposes[outer_p] = _transpose_outer

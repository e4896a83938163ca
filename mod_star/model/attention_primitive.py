"""Attention of queries to several memories as JAX primitives: rules for `vmap`, for gradients, for platforms.

Why primitives of our own: the network is written for one sequence and `vmap`ped, but how attention is best computed
depends on all axes together. Under a `vmap` over thoughts, which share the keys of their text, the rule here leaves the
keys as they are, and says that so many rows share them. Under a `vmap` over sequences it makes further rows of both.
The gradient is computed from the log-sum-exp, so that no scores are kept. Then each platform lowers the whole.

    attention           queries, memories -> result, log-sum-exp
    attention_tangent   its derivative in the direction of tangents, in which it is linear
    attention_gradient  the transpose of that

Operands are flat: the leaves of `Queries` and `Memory`s as `attention_whole` defines them, then what else there is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mod_star.model import attention_blocks, attention_whole
from mod_star.model.attention_whole import Memory, Queries

attention_p = Primitive("attention")
tangent_p = Primitive("attention_tangent")
gradient_p = Primitive("attention_gradient")

OF_QUERIES, OF_MEMORY = 3, 5
"""Operands that stand for `Queries`, and for each `Memory`."""
KEYS, VALUES, UNTIL = 0, 1, 4
"""Places among a memory's operands. Its last one belongs to the queries: it has their rows."""

Arrays = Sequence[Any]


def attention(
    queries: Queries, memories: Sequence[Memory], precision: Any, partitioned: bool
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the union of the memories.

    Args:
      queries: at least one row.
      memories: at least one.
      precision: of products of float32 operands.
      partitioned: whether the program is for a mesh, where the compiler cuts up products along their rows and heads.

    Returns:
      BxKxGxNxE in the queries' type, and the float32 log-sum-exp of their scores BxKxGxN.
    """
    operands = jax.tree.leaves((queries, list(memories)))
    result, log_sum = attention_p.bind(*operands, count=len(memories), precision=precision, partitioned=partitioned)
    return result, log_sum


def _unpacked(operands: Arrays, count: int) -> tuple[Queries, list[Memory], list[Any]]:
    """Queries, `count` memories, and the operands after them."""
    starts = [OF_QUERIES + i * OF_MEMORY for i in range(count)]
    memories = [Memory(*operands[start : start + OF_MEMORY]) for start in starts]
    return Queries(*operands[:OF_QUERIES]), memories, list(operands[OF_QUERIES + count * OF_MEMORY :])


# Shapes.


def _shape(*operands: ShapedArray, count: int, precision: Any, partitioned: bool) -> list[ShapedArray]:
    del count, precision, partitioned
    query = operands[0]
    return [ShapedArray(query.shape, query.dtype), ShapedArray(query.shape[:-1], jnp.float32)]


def _gradient_shape(*operands: ShapedArray, count: int, precision: Any, partitioned: bool) -> list[ShapedArray]:
    del precision, partitioned
    queries, memories, _ = _unpacked(operands, count)
    leaves: list[Any] = [queries.query_BxKxGxNxE]
    for memory in memories:
        leaves += [memory.keys_CxKxMxE, memory.values_CxKxMxE]
    return [ShapedArray(leaf.shape, leaf.dtype) for leaf in leaves]


# Derivatives.


def _differentiable(count: int) -> list[int]:
    """Places of the operands that have a gradient: the query, and each memory's keys and values."""
    starts = [OF_QUERIES + i * OF_MEMORY for i in range(count)]
    return [0, *(start + place for start in starts for place in (KEYS, VALUES))]


def _jvp(primals: Arrays, tangents: Arrays, **params: Any) -> tuple[Any, Any]:
    outputs = attention_p.bind(*primals, **params)
    moved = [tangents[place] for place in _differentiable(params["count"])]
    if all(type(tangent) is ad.Zero for tangent in moved):
        zero: Any = ad.Zero
        return outputs, [zero.from_primal_value(output) for output in outputs]
    return outputs, tangent_p.bind(*primals, *outputs, *map(ad.instantiate_zeros, moved), **params)


def _tangent(*operands: jax.Array, count: int, precision: Any, partitioned: bool) -> list[jax.Array]:
    """By JAX's own rules. No program of training or decoding contains it: there it is transposed."""
    del partitioned
    queries, memories, rest = _unpacked(operands, count)
    places = _differentiable(count)

    def function(*moved: jax.Array) -> tuple[jax.Array, jax.Array]:
        every: list[Any] = jax.tree.leaves((queries, memories))
        for place, value in zip(places, moved, strict=True):
            every[place] = value
        result, log_sum = attention_whole.forward(*_unpacked(every, count)[:2], precision)
        return result.astype(operands[0].dtype), log_sum

    return list(jax.jvp(function, tuple(operands[place] for place in places), tuple(rest[2:]))[1])


def _transpose(cotangents: Arrays, *operands: Any, **params: Any) -> list[Any]:
    count = params["count"]
    _, _, rest = _unpacked(operands, count)
    result, log_sum, *tangents = rest
    if all(type(each) is ad.Zero for each in cotangents):
        return [None] * (len(operands) - len(tangents)) + [ad.Zero(each.aval) for each in tangents]
    primals = operands[: OF_QUERIES + count * OF_MEMORY]
    gradients = gradient_p.bind(*primals, result, log_sum, *map(ad.instantiate_zeros, cotangents), **params)
    of_tangents = [
        gradient if ad.is_undefined_primal(each) else None for gradient, each in zip(gradients, tangents, strict=True)
    ]
    return [None] * (len(operands) - len(tangents)) + of_tangents


# Batches.


def _batch(operands: Arrays, dims: Arrays, **params: Any) -> tuple[list[jax.Array], list[int]]:
    """A batch of attentions is one with more rows. Memories without the batch's axis are shared by them."""
    count = params["count"]
    memories = [range(start, start + UNTIL) for start in range(OF_QUERIES, OF_QUERIES + count * OF_MEMORY, OF_MEMORY)]
    shared = {place for memory in memories if all(dims[place] is None for place in memory) for place in memory}
    if not shared:
        return _batch_outermost(attention_p, operands, dims, **params)
    size, B = _size(operands, dims), operands[1].shape[0 if dims[1] is None else int(dims[1] == 0)]
    rows = []
    for place, (operand, dim) in enumerate(zip(operands, dims, strict=True)):
        if place in shared:
            rows.append(operand)
            continue
        spread = _moved(operand, dim, size, 1)
        spread = jnp.repeat(spread, B // spread.shape[0], 0)  # shared until now, and by a part of the rows
        rows.append(spread.reshape(-1, *spread.shape[2:]))
    outputs = attention_p.bind(*rows, **params)
    return [output.reshape(B, size, *output.shape[1:]) for output in outputs], [1] * len(outputs)


def _batch_outermost(
    primitive: Primitive, operands: Arrays, dims: Arrays, **params: Any
) -> tuple[list[jax.Array], list[int]]:
    """All operands get the axis, and it is put before that of the rows."""
    size = _size(operands, dims)
    rows = [_moved(operand, dim, size, 0) for operand, dim in zip(operands, dims, strict=True)]
    outputs = primitive.bind(*(row.reshape(-1, *row.shape[2:]) for row in rows), **params)
    return [output.reshape(size, -1, *output.shape[1:]) for output in outputs], [0] * len(outputs)


def _size(operands: Arrays, dims: Arrays) -> int:
    size: int = next(operand.shape[dim] for operand, dim in zip(operands, dims, strict=True) if dim is not None)
    return size


def _moved(operand: jax.Array, dim: int | None, size: int, to: int) -> jax.Array:
    """The operand with the batch's axis at `to`; a copy for each if it had none."""
    if dim is not None:
        return jnp.moveaxis(operand, dim, to)
    return jnp.broadcast_to(jnp.expand_dims(operand, to), (*operand.shape[:to], size, *operand.shape[to:]))


# Costs, and what each platform computes.


def attention_flops(primitive: Primitive, operands: Arrays, count: int) -> float:
    """Operations of the products, two per multiply-add, as if every query saw every key (as `mod_star.flops` counts).

    The gradient has five products where the result has two: the scores are computed again.
    """
    queries, memories, _ = _unpacked(operands, count)
    pairs = float(queries.query_BxKxGxNxE.size) * sum(memory.ids_CxM.shape[1] for memory in memories)
    return 2.0 * pairs * {attention_p: 2, gradient_p: 5, tangent_p: 6}[primitive]


def _forward(*operands: jax.Array, count: int, precision: Any, partitioned: bool, blocks: bool) -> list[jax.Array]:
    queries, memories, _ = _unpacked(operands, count)
    large = [memory for memory in memories if blocks and not partitioned and attention_blocks.is_large(queries, memory)]
    if not large:
        result, log_sum = attention_whole.forward_in_turn(queries, memories, precision)
        return [result.astype(operands[0].dtype), log_sum]
    pieces = [attention_blocks.forward(queries, memory, precision) for memory in large]
    if small := [memory for memory in memories if not any(memory is other for other in large)]:
        pieces.append(attention_whole.forward_in_turn(queries, small, precision))
    result, log_sum = pieces[0] if len(pieces) == 1 else _union(pieces)
    return [result.astype(operands[0].dtype), log_sum]


def _union(pieces: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over several memories from those over each: weighted by their shares of the sum."""
    log_sums = jnp.stack([log_sum for _, log_sum in pieces])
    log_sum = jax.nn.logsumexp(log_sums, 0)
    shares = jnp.exp(log_sums - log_sum)[..., None]
    return functools.reduce(
        jnp.add, [share * result for share, (result, _) in zip(shares, pieces, strict=True)]
    ), log_sum


def _gradient(*operands: jax.Array, count: int, precision: Any, partitioned: bool, blocks: bool) -> list[jax.Array]:
    queries, memories, (result, log_sum, grad, log_sum_grad) = _unpacked(operands, count)
    delta = jnp.sum(result.astype(jnp.float32) * grad.astype(jnp.float32), -1) - log_sum_grad
    of_query, of_memories = jnp.float32(0), []
    for memory in memories:
        in_blocks = blocks and not partitioned and attention_blocks.is_large(queries, memory)
        way: Callable[..., Any] = attention_blocks.gradient if in_blocks else attention_whole.gradient_in_turn
        own, of_keys, of_values = way(queries, memory, precision, log_sum, delta, grad)
        of_query += own
        of_memories += [of_keys.astype(memory.keys_CxKxMxE.dtype), of_values.astype(memory.values_CxKxMxE.dtype)]
    return [of_query.astype(operands[0].dtype), *of_memories]


def _register(primitive: Primitive, shape: Any, batch: Any, elsewhere: Any, on_cpu: Any) -> None:
    def execute(*operands: jax.Array, **params: Any) -> Any:
        compute = on_cpu if jax.default_backend() == "cpu" else elsewhere
        return jax.jit(functools.partial(compute, **params))(*operands)

    primitive.multiple_results = True
    primitive.def_abstract_eval(shape)
    primitive.def_impl(execute)
    mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=True))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=True), platform="cpu")
    batching.primitive_batchers[primitive] = batch


def _both(compute: Any) -> tuple[Any, Any]:
    """What other platforms and what a CPU computes."""
    return functools.partial(compute, blocks=False), functools.partial(compute, blocks=True)


_register(attention_p, _shape, _batch, *_both(_forward))
_register(gradient_p, _gradient_shape, functools.partial(_batch_outermost, gradient_p), *_both(_gradient))
_register(tangent_p, _shape, functools.partial(_batch_outermost, tangent_p), _tangent, _tangent)
ad.primitive_jvps[attention_p] = _jvp
ad.primitive_transposes[tangent_p] = _transpose

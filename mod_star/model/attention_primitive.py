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
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh

from mod_star.model import attention_blocks, attention_shards, attention_whole
from mod_star.model.attention_whole import Memory, Queries
from mod_star.model.linear import FEWEST_ON_TPUS

attention_p = Primitive("attention")
tangent_p = Primitive("attention_tangent")
gradient_p = Primitive("attention_gradient")

OF_QUERIES, OF_MEMORY = 3, 5
"""Operands that stand for `Queries`, and for each `Memory`."""
KEYS, VALUES, UNTIL = 0, 1, 4
"""Places among a memory's operands. Its last one belongs to the queries: it has their rows."""

Arrays = Sequence[Any]


def attention(
    queries: Queries, memories: Sequence[Memory], precision: Any, mesh: AbstractMesh | None, plain: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the union of the memories.

    Args:
      queries: at least one row.
      memories: at least one.
      precision: of products of float32 operands.
      mesh: that the program is for; None: one device.
      plain: plain products on every platform, whatever it has of its own.

    Returns:
      BxKxGxNxE in the queries' type, and the float32 log-sum-exp of their scores BxKxGxN.
    """
    operands = jax.tree.leaves((queries, list(memories)))
    result, log_sum = attention_p.bind(*operands, count=len(memories), precision=precision, mesh=mesh, plain=plain)
    return result, log_sum


def _unpacked(operands: Arrays, count: int) -> tuple[Queries, list[Memory], list[Any]]:
    """Queries, `count` memories, and the operands after them."""
    starts = [OF_QUERIES + i * OF_MEMORY for i in range(count)]
    memories = [Memory(*operands[start : start + OF_MEMORY]) for start in starts]
    return Queries(*operands[:OF_QUERIES]), memories, list(operands[OF_QUERIES + count * OF_MEMORY :])


# Shapes.


def _shape(*operands: ShapedArray, **params: Any) -> list[ShapedArray]:
    del params
    query = operands[0]
    return [ShapedArray(query.shape, query.dtype), ShapedArray(query.shape[:-1], jnp.float32)]


def _gradient_shape(*operands: ShapedArray, count: int, **params: Any) -> list[ShapedArray]:
    del params
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


def _tangent(*operands: jax.Array, count: int, precision: Any, mesh: Any, way: Any) -> list[jax.Array]:
    """By JAX's own rules. No program of training or decoding contains it: there it is transposed."""
    del mesh, way
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


class Place(NamedTuple):
    """What a way is told besides arrays."""

    mesh: AbstractMesh | None
    precision: Any
    dtype: Any
    """Of the result, and of the gradient of queries."""


@dataclass(frozen=True)
class Way:
    """A way to compute attention over one memory where it is large."""

    is_large: Callable[[Queries, Memory], bool]
    forward: Callable[..., Any]
    """(queries, memory, precision, type of the result) -> result, log-sum-exp."""
    gradient: Callable[..., Any]
    """(queries, memory, precision, log-sum-exp, delta, gradient, type of the queries' gradient) -> gradients."""
    on_meshes: bool
    """Whether it is used on a mesh too, by each device for its own rows and heads."""
    fewest: int = 1
    """Rows of a plain product, where a memory is small: zeros fill it up."""

    def takes(self, queries: Queries, memory: Memory, mesh: AbstractMesh | None) -> bool:
        """Whether attention over this memory is computed so."""
        if not self.is_large(queries, memory):
            return False
        return mesh is None or (self.on_meshes and attention_shards.divides(mesh, memory))

    def run(self, name: str, place: Place, queries: Queries, memory: Memory, *arrays: Any) -> Any:
        """`forward` or `gradient` with these arrays, on a mesh or without."""

        def call(queries: Queries, memory: Memory, *arrays: Any) -> Any:
            return getattr(self, name)(queries, memory, place.precision, *arrays, place.dtype)

        mesh = place.mesh
        return (call if mesh is None else attention_shards.sharded(mesh, call))(queries, memory, *arrays)


def _for_tpus() -> ModuleType:
    from mod_star.model import attention_kernel

    return attention_kernel


def _for_gpus() -> ModuleType:
    from mod_star.model import attention_triton

    return attention_triton


def _kernels(module: Callable[[], ModuleType], fewest: int = 1) -> Way:
    """A way by kernels, imported when a program for their platform is lowered: importing Pallas takes a while."""

    def function(name: str) -> Callable[..., Any]:
        return lambda *args: getattr(module(), name)(*args)

    return Way(function("is_large"), function("forward"), function("gradient"), on_meshes=True, fewest=fewest)


BLOCKS = Way(attention_blocks.is_large, attention_blocks.forward, attention_blocks.gradient, on_meshes=False)
KERNEL = _kernels(_for_tpus, fewest=FEWEST_ON_TPUS)
TRITON = _kernels(_for_gpus)


def _forward(
    *operands: jax.Array, count: int, precision: Any, mesh: AbstractMesh | None, way: Way | None
) -> list[jax.Array]:
    queries, memories, _ = _unpacked(operands, count)
    dtype, fewest = operands[0].dtype, way.fewest if way else 1
    large = [memory for memory in memories if way and way.takes(queries, memory, mesh)]
    if not way or not large:
        result, log_sum = attention_whole.forward_in_turn(queries, memories, precision, fewest)
        return [result.astype(dtype), log_sum]
    place = Place(mesh, precision, dtype if count == 1 else jnp.float32)
    pieces = [way.run("forward", place, queries, memory) for memory in large]
    if small := [memory for memory in memories if not any(memory is other for other in large)]:
        pieces.append(attention_whole.forward_in_turn(queries, small, precision, fewest))
    result, log_sum = pieces[0] if len(pieces) == 1 else attention_whole.union(pieces)
    return [result.astype(dtype), log_sum]


def _gradient(
    *operands: jax.Array, count: int, precision: Any, mesh: AbstractMesh | None, way: Way | None
) -> list[jax.Array]:
    queries, memories, (result, log_sum, grad, log_sum_grad) = _unpacked(operands, count)
    # As a product: XLA:CPU takes 40 times as long for a sum of products whose axes are five, one of size 1 among them.
    wide = result.astype(jnp.float32), grad.astype(jnp.float32)
    delta = jnp.einsum("bkgne,bkgne->bkgn", *wide, precision="highest") - log_sum_grad
    place = Place(mesh, precision, operands[0].dtype if count == 1 else jnp.float32)
    of_query, of_memories = jnp.zeros((), place.dtype), []
    for memory in memories:
        if way and way.takes(queries, memory, mesh):
            gradients = way.run("gradient", place, queries, memory, log_sum, delta, grad)
        else:
            gradients = attention_whole.gradient_in_turn(queries, memory, precision, log_sum, delta, grad)
        of_query = of_query + gradients[0]
        of_memories += [each.astype(memory.keys_CxKxMxE.dtype) for each in gradients[1:]]
    return [of_query.astype(operands[0].dtype), *of_memories]


def _for_a_gpu(rule: Any) -> Any:
    """The rule, where it needs no GPU at hand: JAX 0.12 lowers a kernel of Triton's only for a GPU that it can name."""
    device = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")

    def lowered(context: Any, *operands: Any, mesh: AbstractMesh | None, **params: Any) -> Any:
        if jax.default_backend() == "gpu":
            return rule(context, *operands, mesh=mesh, **params)
        with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh().update(abstract_device=device)):
            mesh = None if mesh is None else mesh.update(abstract_device=device)
            return rule(context, *operands, mesh=mesh, **params)

    return lowered


def _register(primitive: Primitive, shape: Any, batch: Any, compute: Any, ways: dict[str, Way | None]) -> None:
    """Gives a primitive its rules.

    Args:
      primitive: gets them.
      shape: of its results.
      batch: of `vmap`.
      compute: what it computes, given a way.
      ways: by platform; "" for all others.
    """

    def execute(*operands: jax.Array, plain: bool, **params: Any) -> Any:
        if jax.config.values["jax_disable_jit"]:  # for debugging, in Python: there is no program to lower
            return compute(*operands, way=None, **params)
        return jax.jit(functools.partial(primitive.bind, plain=plain, **params))(*operands)

    def lower(way: Way | None) -> Any:
        def computed(*operands: jax.Array, plain: bool, **params: Any) -> Any:
            return compute(*operands, way=None if plain else way, **params)

        return mlir.lower_fun(computed, multiple_results=True)

    primitive.multiple_results = True
    primitive.def_abstract_eval(shape)
    primitive.def_impl(execute)
    for platform, way in ways.items():
        rule = _for_a_gpu(lower(way)) if platform == "cuda" else lower(way)
        mlir.register_lowering(primitive, rule, platform=platform or None)
    batching.primitive_batchers[primitive] = batch


WAYS: dict[str, Way | None] = {"cpu": BLOCKS, "tpu": KERNEL, "cuda": TRITON, "": None}
"""By platform. None: plain products, some queries after the others."""

_register(attention_p, _shape, _batch, _forward, WAYS)
_register(gradient_p, _gradient_shape, functools.partial(_batch_outermost, gradient_p), _gradient, WAYS)
_register(tangent_p, _shape, functools.partial(_batch_outermost, tangent_p), _tangent, {"": None})
ad.primitive_jvps[attention_p] = _jvp
ad.primitive_transposes[tangent_p] = _transpose

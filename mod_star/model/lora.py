"""LoRA (arXiv 2106.09685): a frozen matrix W and a trained product of two small ones, W + alpha / rank · A·B.

Adapters are stored apart from the weights, at params["lora"] under the weights' own paths:

    params["lora"]["groups"]["full_0"]["block"]["query"] = {"a": ..., "b": ...}      stacked over groups, as the weights

A training step computes with them as they are: `with_adapters` puts an `Adapted` where each weight was, and `linear`
multiplies by its parts one after the other, so that neither W + A·B nor a gradient of W ever exists. Whatever else uses
a model takes `merged` parameters, which have no adapters: `mod_star.load_run` gives those.

A is the transpose of the paper's A, since weights here are input x output, and B of its B.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import unflatten_dict

from mod_star.config import LoraConfig
from mod_star.errors import InputError
from mod_star.model.precision import HIGHEST
from mod_star.trainable import Names, leaves_by_path, matching, path_names

OF_HEADS = ("query", "key", "value", "output")
"""Weights of the built-in block that have three dimensions: those of the heads count as one."""


@struct.dataclass
class Adapted:
    """A weight with its adapter, in the place of the weight: the matrix weight + scale · a·b.

    It has as much of an array's interface as a block uses before it calls `mod_star.model.linear.linear`. As parameters
    are, it may be stacked over groups; then all its arrays are.
    """

    weight: jax.Array
    """Float32 weight, in two or three dimensions."""
    a: jax.Array
    """DxR, where the weight as a matrix is DxF."""
    b: jax.Array
    """RxF."""
    scale: float = struct.field(pytree_node=False)
    """alpha / rank."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return self.weight.ndim

    @property
    def dtype(self) -> Any:
        """Of the weight."""
        return self.weight.dtype

    def astype(self, dtype: Any) -> Adapted:
        """All of its arrays in another type."""
        return Adapted(self.weight.astype(dtype), self.a.astype(dtype), self.b.astype(dtype), self.scale)

    def reshape(self, *shape: int) -> Adapted:
        """The weight in another shape, such as that of a matrix."""
        return Adapted(self.weight.reshape(*shape), self.a, self.b, self.scale)

    def merged(self) -> jax.Array:
        """The one weight that does the same, in its own shape and type; computed in float32."""
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        product = jnp.matmul(a, b, precision=HIGHEST)
        whole = self.weight.astype(jnp.float32) + self.scale * product.reshape(self.weight.shape)
        return whole.astype(self.weight.dtype)


def scale_of(lora: LoraConfig) -> float:
    """What A·B is multiplied by (section 4.1): a larger rank alone does not learn faster."""
    return lora.alpha / lora.rank


def is_adapted(node: Any) -> bool:
    """Whether a node of a tree is an `Adapted`; for `jax.tree.map(..., is_leaf=is_adapted)`."""
    return isinstance(node, Adapted)


def target_paths(lora: LoraConfig, params: Any) -> frozenset[Names]:
    """Paths of the weights that get an adapter: matrices of blocks that `lora.targets` matches.

    Args:
      lora: its targets.
      params: arrays or shapes, stacked over groups.

    Raises:
      InputError: a target matches no matrix of a block.
    """
    matrices = [names for names, leaf in leaves_by_path(params).items() if _is_matrix(names, leaf.ndim - 1)]
    return matching("lora.targets", lora.targets, matrices, "matrix of a block")


def _is_matrix(names: Names, dimensions: int) -> bool:
    """Whether a parameter of so many dimensions, without that of groups, is a matrix of a block."""
    if names[0] != "groups" or "block" not in names or "router" in names or names[-1].endswith("_bias"):
        return False
    return dimensions == 2 or (dimensions == 3 and names[-1] in OF_HEADS)


def matrix_shape(names: Names, shape: Iterable[int]) -> tuple[int, int]:
    """Inputs and outputs of a weight, whose shape is given without the dimension of groups.

    Heads are outputs of query, key and value, and inputs of output.
    """
    first, *middle, last = shape
    return (first * math.prod(middle), last) if names[-1] == "output" else (first, math.prod(middle) * last)


def lora_init(key: jax.Array, lora: LoraConfig, params: Any) -> dict[str, Any]:
    """Float32 adapters of a model's targets: A normal with variance 1 / inputs, B zero, so that nothing changes yet.

    Args:
      key: for A.
      lora: rank and targets.
      params: the model's, stacked over groups.

    Returns:
      What becomes params["lora"].

    Raises:
      InputError: a target matches no matrix of a block.
    """
    leaves, adapters = leaves_by_path(params), {}
    targets = sorted(target_paths(lora, params))
    for names, own_key in zip(targets, jax.random.split(key, len(targets)), strict=True):
        groups, *shape = leaves[names].shape
        inputs, outputs = matrix_shape(names, shape)
        normal = jax.random.normal(own_key, (groups, inputs, lora.rank), jnp.float32)
        adapters[(*names, "a")] = normal * inputs**-0.5
        adapters[(*names, "b")] = jnp.zeros((groups, lora.rank, outputs), jnp.float32)
    return dict(unflatten_dict(adapters))


def with_adapters(params: Any, lora: LoraConfig) -> Any:
    """The parameters with an `Adapted` in the place of each weight that has an adapter, and without "lora".

    Args:
      params: with or without "lora"; without, they are returned as they are.
      lora: what the adapters are scaled by.
    """
    if "lora" not in params:
        return params
    adapters = leaves_by_path(params["lora"])

    def adapted(path: tuple[Any, ...], leaf: Any) -> Any:
        a, b = (adapters.get((*path_names(path), name)) for name in ("a", "b"))
        return leaf if a is None or b is None else Adapted(leaf, a, b, scale_of(lora))

    others = {name: value for name, value in params.items() if name != "lora"}
    return jax.tree_util.tree_map_with_path(adapted, others)


def with_merged(tree: Any) -> Any:
    """A tree with one weight in the place of each `Adapted`."""
    return jax.tree.map(lambda node: node.merged() if is_adapted(node) else node, tree, is_leaf=is_adapted)


def merged(params: Any, lora: LoraConfig, donate: bool = False) -> Any:
    """The parameters of the plain model that computes the same. Each new weight lies where the old one does.

    Args:
      params: arrays, with or without "lora"; without, they are returned as they are.
      lora: what the adapters were trained with.
      donate: put each new weight in the memory of the old one, which nobody can use afterwards.
    """

    def place(node: Any) -> Any:
        if not is_adapted(node):
            return node
        where, given = getattr(node.weight, "sharding", None), (0,) if donate else ()
        merge = jax.jit(
            lambda weight, a, b: Adapted(weight, a, b, node.scale).merged(), out_shardings=where, donate_argnums=given
        )
        return merge(node.weight, node.a, node.b)

    return jax.tree.map(place, with_adapters(params, lora), is_leaf=is_adapted)


def require_merged(params: Any) -> None:
    """Raises InputError if there are adapters that what comes next would pass over."""
    if "lora" in params:
        raise InputError(
            "params: hold adapters (params['lora']) that are not merged; mod_star.load_run merges them, and so does "
            "mod_star.model.lora.merged(params, run.lora)"
        )

"""A source's tensors become our parameters, one at a time, each straight to its place and to float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mod_star.config import ModelConfig, RoutingConfig
from mod_star.errors import InputError
from mod_star.model import Decoder
from mod_star.pretrained.families import FAMILIES, Name, Names
from mod_star.pretrained.source import Source, SourceTensor

DENSE = RoutingConfig(every=0)
_BLOCK = ("groups", "full_0", "block")


@dataclass(frozen=True)
class Place:
    """Where one tensor of a checkpoint belongs."""

    tensor: str
    """Its name."""
    name: Name
    """How it is laid out."""
    path: tuple[str, ...]
    """The parameter, from the root of the tree."""
    layer: int | None
    """Index along the parameter's first axis; None: the parameter is no block's."""
    shape: tuple[int, ...]
    """Of the parameter, in one layer."""

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.name.source_shape(self.shape)


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """The tree of a dense model's parameters, as `jax.ShapeDtypeStruct`s."""
    decoder = Decoder(config, DENSE)
    tokens = jax.ShapeDtypeStruct((2,), "int32")
    shapes: dict[str, Any] = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["params"]
    return shapes


def places(names: Names, shapes: Mapping[str, Any]) -> Iterator[Place]:
    """Every tensor that a checkpoint of a dense model must have, for a tree of arrays or shapes."""
    for path, leaf in _leaves(shapes):
        in_block = path[: len(_BLOCK)] == _BLOCK
        name = names[path[len(_BLOCK) :] if in_block else path]
        if in_block:
            for layer in range(leaf.shape[0]):
                yield Place(name.template.format(layer), name, path, layer, leaf.shape[1:])
        else:
            yield Place(name.template, name, path, None, leaf.shape)


def check_source(source: Source) -> list[Place]:
    """The places of all of a source's tensors, the largest tensors first.

    Raises:
      InputError: a tensor is missing, superfluous or of another shape; nothing has been allocated then.
    """
    config = source.config
    # A damaged number of layers must not cost memory or time: every layer has tensors.
    if config.layers > len(source.tensors):
        raise InputError(f"{source.path}: has {len(source.tensors)} tensors, too few for {config.layers} layers")
    checked, expected = [], set()
    for place in places(FAMILIES[source.family].names, param_shapes(config)):
        tensor = source.tensors.get(place.tensor)
        if tensor is None:
            raise InputError(
                f"{source.path}: tensor {place.tensor} is missing (expected shape {list(place.source_shape)})"
            )
        if tensor.shape != place.source_shape:
            raise InputError(
                f"{source.path}: tensor {place.tensor} has shape {list(tensor.shape)}, expected "
                f"{list(place.source_shape)}"
            )
        expected.add(place.tensor)
        checked.append(place)
    for name in sorted(source.tensors.keys() - expected):
        raise InputError(
            f"{source.path}: tensor {name} of shape {list(source.tensors[name].shape)} has no place in a "
            f"{FAMILIES[source.family].title} model of {config.layers} layers"
        )
    # While the first ones are loaded, little memory is in use yet: pages of `np.empty` count from the first write.
    return sorted(checked, key=lambda place: -math.prod(place.shape))


def build_params(source: Source, progress: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Loads a source: float32 NumPy arrays in the tree that `Decoder` has, blocks stacked over layers.

    Besides the parameters, one tensor at a time is in memory.

    Args:
      source: an opened model.
      progress: called with the number of elements after each tensor.

    Raises:
      InputError: as `check_source`; or a tensor can't be read, or holds NaN or infinity.
    """
    checked = check_source(source)
    params: dict[str, Any] = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), param_shapes(source.config))
    for place in checked:
        tensor = source.tensors[place.tensor]
        target = leaf_at(params, place.path)
        _fill(target if place.layer is None else target[place.layer], place, tensor)
        if not np.isfinite(target if place.layer is None else target[place.layer]).all():
            raise InputError(f"{source.path}: tensor {place.tensor} holds values that are not finite")
        progress(math.prod(place.shape))
    return params


def _fill(target: np.ndarray, place: Place, tensor: SourceTensor) -> None:
    array = tensor.load()
    if place.name.inputs:
        outputs, inputs = place.source_shape
        # Written in our order, read across: of two ways, the faster one.
        np.copyto(target.reshape(inputs, outputs), array.T, casting="same_kind")
    else:
        np.copyto(target, array.reshape(target.shape), casting="same_kind")


def take_tensor(params: Mapping[str, Any], place: Place) -> np.ndarray:
    """The tensor of a checkpoint that `build_params` would put into `place`: float32, contiguous."""
    leaf = leaf_at(params, place.path)
    array = np.asarray(leaf if place.layer is None else leaf[place.layer], np.float32)
    if place.name.inputs:
        outputs, inputs = place.source_shape
        return np.ascontiguousarray(array.reshape(inputs, outputs).T)
    return np.ascontiguousarray(array).reshape(place.source_shape)


def leaf_at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict."""
    for key in path:
        tree = tree[key]
    return tree


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value

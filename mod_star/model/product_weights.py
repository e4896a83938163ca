"""Which of a model's params are weights of matrix products, and the params with these in 8 bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mod_star.errors import require
from mod_star.model.int8 import Int8Weight, quantise
from mod_star.model.parts import DEFAULT_PARTS
from mod_star.model.transformer import Decoder, StackedParams

WEIGHTS = ("int8",)
"""Ways to keep them that can be asked for."""
OF_BLOCK, OF_FEED_FORWARD, OF_TOP = ("query", "key", "value", "output"), ("gate", "up", "down"), ("embedding", "head")


def require_weights(weights: str | None, option: str = "weights") -> None:
    """Raises InputError unless weights can be kept so; None: in the model's own type."""
    require(weights is None or weights in WEIGHTS, option, weights, f"must be one of {', '.join(WEIGHTS)}")


def is_product_weight(decoder: Decoder, path: tuple[Any, ...]) -> bool:
    """Whether a leaf of the params is a weight of a matrix product, embedding and LM head included.

    All of them are read in the compute type. What computes in float32 (norms, router, predictor, mixing head) is none,
    and neither is what belongs to a user's part.

    Args:
      decoder: the model.
      path: of the leaf, as `jax.tree_util` gives it.
    """
    names: set[str] = set()
    if decoder.parts.block is DEFAULT_PARTS.block:
        names |= set(OF_BLOCK)
    if decoder.parts.feed_forward is DEFAULT_PARTS.feed_forward:
        names |= set(OF_FEED_FORWARD)
    keys = [getattr(entry, "key", None) for entry in path]
    return (len(keys) == 1 and keys[0] in OF_TOP) or ("block" in keys and keys[-1] in names)


def narrow_types(decoder: Decoder, params: StackedParams) -> dict[str, Any]:
    """The type that each of the params can be kept in where they are only read: weights of matrix products in the
    compute type, which they are rounded to at every use anyway.

    What computes in float32 (norms, router, predictor, mixing head) stays as it is, and so do a user's parts.
    """
    dtype = decoder.config.dtype
    if dtype == "float32":
        return jax.tree.map(lambda leaf: leaf.dtype, params)

    def narrow(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        return jnp.dtype(dtype) if is_product_weight(decoder, path) else leaf.dtype

    return jax.tree_util.tree_map_with_path(narrow, params)


def quantised(decoder: Decoder, params: StackedParams, donate: bool = False) -> StackedParams:
    """Params with every weight of a matrix product as an `Int8Weight`, see `mod_star.model.int8`, except for experts.

    Args:
      decoder: the model.
      params: as trained.
      donate: delete the array of each weight when it has been quantised, so that at most one exists twice.
    """
    done: dict[int, Int8Weight] = {}  # an array that is there twice, as tied weights may be, is quantised once

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if not is_product_weight(decoder, path) or any(getattr(entry, "key", None) == "experts" for entry in path):
            return leaf
        if id(leaf) not in done:
            stacked, name = path[0].key == "groups", path[-1].key
            axes = 2 if name == "output" else 1
            done[id(leaf)] = jax.block_until_ready(
                quantise(leaf, axes, outputs_first=name in OF_TOP, stacked=stacked)
            )  # fmt: skip
            if donate and isinstance(leaf, jax.Array):
                leaf.delete()
        return done[id(leaf)]

    return jax.tree_util.tree_map_with_path(one, params)

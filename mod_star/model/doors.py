"""What a user's function returns is checked where it is traced, before anything is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mod_star.errors import InputError


def require_array(door: str, value: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """The array that a user's function has returned.

    Args:
      door: field of `mod_star.Parts`, and what of it, for the error.
      value: what was returned.
      shape: that it must have.
      dtype: that it must have.

    Raises:
      InputError: it is no array, or of another shape or type; names the door.
    """
    expected = f"{jnp.dtype(dtype).name}{list(shape)}"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise InputError(f"parts.{door} = {type(value).__name__}: must be an array {expected}")
    if tuple(value.shape) != tuple(shape) or value.dtype != dtype:
        raise InputError(f"parts.{door} = {value.dtype}{list(value.shape)}: must be {expected}")
    return jnp.asarray(value)


def require_same_structure(door: str, value: Any, like: Any) -> Any:
    """The pytree that a user's function has returned; its leaves must be as those of `like`.

    Raises:
      InputError: the structure, or a leaf's shape or type, is another; names the door and the leaf.
    """
    structure, expected = str(jax.tree.structure(value)), str(jax.tree.structure(like))
    if structure != expected:
        raise InputError(f"parts.{door} = {structure}: must have the structure {expected}")
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(value), jax.tree.leaves(like), strict=True):
        require_array(f"{door}{jax.tree_util.keystr(path)}", leaf, other.shape, other.dtype)
    return value

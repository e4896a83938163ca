"""How the rows of a routed block's tokens are moved in and out, by gathers alone.

Selected indices are unique and sorted, so the inverse of "token of slot c" is "slot of token i", and moving rows in
either direction is a gather. `dispatch` and `combine` are each other's transposes and say so to autodiff: no scatter
appears in the forward or the backward pass (a scatter-add made the training step as slow as the dense one).

C is the number of slots of a routed block, S the tokens of the sequence.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Selection:
    """Which tokens a routed block computes, as a one-to-one map between C slots and S tokens."""

    indices_C: jax.Array
    """int32 token of each slot, ascending; meaningless where the slot is not filled."""
    filled_C: jax.Array
    """bool; False for slots left over when fewer than C tokens are selected."""
    mask_S: jax.Array
    """bool; True for the tokens that have a slot."""
    slot_S: jax.Array
    """int32 slot of each token, in [0, C); meaningless where the mask is False."""


def _rows(x: jax.Array, indices: jax.Array, keep: jax.Array) -> jax.Array:
    rows = jnp.take(x, indices, axis=0, mode="clip")
    return jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), rows, 0)


@jax.custom_vjp
def dispatch(x_SxD: jax.Array, selection: Selection) -> jax.Array:
    """Rows of the selected tokens, CxD (or C from S); zeros in empty slots."""
    return _rows(x_SxD, selection.indices_C, selection.filled_C)


@jax.custom_vjp
def combine(y_CxD: jax.Array, selection: Selection) -> jax.Array:
    """Puts the slots' rows back at their tokens, SxD; zeros at the tokens that pass by."""
    return _rows(y_CxD, selection.slot_S, selection.mask_S)


dispatch.defvjp(
    lambda x, selection: (dispatch(x, selection), selection),
    lambda selection, grad: (combine(grad, selection), None),
)
combine.defvjp(
    lambda y, selection: (combine(y, selection), selection),
    lambda selection, grad: (dispatch(grad, selection), None),
)


def dispatch_ids(ids_S: jax.Array, selection: Selection) -> jax.Array:
    """`dispatch` for integers, which have no gradient: int32 C, 0 in empty slots."""
    return jnp.where(selection.filled_C, ids_S[selection.indices_C], 0)

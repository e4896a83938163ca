"""The steps of a thought, one token after another: each reads the text, and the thought's earlier tokens in a cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mod_star.model import Decoder, Output
from mod_star.model.attention import KeyValues
from mod_star.model.routing import RoutingCall, Tokens
from mod_star.model.transformer import apply_blocks


def thought_step(
    decoder: Decoder, params: dict[str, Any], memory: Any, token: Tokens, cache: Any, slots: int, *,
    with_gradient: bool = False,
) -> tuple[Output, Any]:  # fmt: skip
    """Runs one token of a thought.

    Args:
      decoder: the model.
      params: its parameters.
      memory: keys/values of the text, as the thought sees them.
      token: one; the thought's tokens stand at positions that follow each other, from that of <start>.
      cache: keys/values of the thought's earlier tokens, from `empty_cache`.
      slots: of a routed block for the thought and what follows it.
      with_gradient: as for `mod_star.model.routing.RoutingCall`.

    Returns:
      What the blocks give for the token, and the cache with its keys/values in the next slot.
    """
    call = RoutingCall(slots=slots, taken=slots_taken(cache), with_gradient=with_gradient)
    output = apply_blocks(decoder, params, token, call, memory=join(memory, cache["blocks"]))
    blocks = _append(cache["blocks"], output.keys_values, cache["tokens"])
    return output, {"blocks": blocks, "tokens": cache["tokens"] + 1}


def empty_cache(memory: Any, slots: int) -> Any:
    """A cache of a thought of `slots` tokens.

    {"blocks": a KeyValues of empty slots for each block, in the structure of `memory`, "tokens": int32 number of tokens
    in it}.
    """

    def empty(key_values: tuple[KeyValues, ...]) -> KeyValues:
        like = key_values[0]
        *leading, _, E = like.keys_KxMxE.shape
        keys = jnp.zeros((*leading, slots, E), like.keys_KxMxE.dtype)
        ids = jnp.zeros((*like.positions_M.shape[:-1], slots), jnp.int32)
        return KeyValues(keys, keys, ids, ids, ids > 0)

    return {"blocks": jax.tree.map(empty, memory, is_leaf=_is_key_values), "tokens": jnp.zeros((), jnp.int32)}


def join(memory: Any, blocks: Any) -> Any:
    """The memory of a thought's token: that of the text, then the thought's own, `cache["blocks"]`."""
    return jax.tree.map(lambda key_values, own: (*key_values, own), memory, blocks, is_leaf=_is_key_values)


def slots_taken(cache: Any) -> Any:
    """Slots of the routed blocks that the thought has taken, as `apply_blocks` takes them; None for a dense model."""

    def taken(blocks: Any) -> Any:
        if isinstance(blocks, tuple):
            return tuple(taken(group) for group in blocks) if "routed" in blocks[0] else None
        return jnp.sum(blocks["routed"].valid_M, -1, dtype=jnp.int32) if "routed" in blocks else None

    return taken(cache["blocks"])


def _is_key_values(node: Any) -> bool:
    return isinstance(node, tuple) and bool(node) and isinstance(node[0], KeyValues)


def _append(blocks: Any, own: Any, slot: jax.Array) -> Any:
    """The keys/values of all blocks, with one token's in `slot`."""

    def write(old: KeyValues, new: KeyValues) -> KeyValues:
        # By a choice between old and new: under `vmap` an update of a slice becomes a scatter.
        here_M = jnp.arange(old.valid_M.shape[-1], dtype=jnp.int32) == slot
        choose = lambda a, b: jnp.where(here_M if a.ndim == old.valid_M.ndim else here_M[:, None], b, a)  # noqa: E731
        return jax.tree.map(choose, old, new)

    return jax.tree.map(write, blocks, own, is_leaf=lambda node: isinstance(node, KeyValues))

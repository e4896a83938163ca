"""Which tokens of a text each routed block computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mod_star.errors import InputError
from mod_star.model.routing import RoutingMode, causal_slots
from mod_star.model.transformer import routed_blocks
from mod_star.runs.directory import LoadedRun
from mod_star.tokenization.tokenizers import StreamDecoder, Tokenizer, begin


@dataclass(frozen=True)
class Routes:
    """A text's tokens and who computed them; what `terminal.routes_text` and `plots.plot_routes` show."""

    tokens: list[str]
    """N pieces of text, bos first."""
    routed_LxN: npt.NDArray[np.bool_]
    """[l, n] is True if routed block l computed token n."""
    block_names: list[str]
    """L names, "block 2" for the second block of the network."""
    overflow: int
    """Times a token passed by because a routed block had no slot left, over all blocks; 0 under top-k routing."""


def routes_of(run: LoadedRun, text: str, mode: RoutingMode = "causal") -> Routes:
    """Runs a text, as one document, and returns its routing.

    Args:
      run: a trained model.
      text: not longer than the context, bos included.
      mode: causal: as when sampling. top_k: as in training, where a block takes its share of the whole text.

    Raises:
      InputError: the model is dense, or the text too long.
    """
    routing, context = run.config.routing, run.config.model.context
    if routing.every == 0:
        raise InputError("routing.every = 0: this is a dense model, without routed blocks")
    ids = begin(run.tokenizer, text)
    if len(ids) > context:
        raise InputError(f"text = {len(ids)} tokens, bos included: must be at most model.context = {context}")
    slots, key = causal_slots(routing, context), jax.random.key(run.config.train.seed)

    def trace(params: dict[str, Any], tokens_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        output: Any = run.decoder.apply({"params": params}, tokens_N, mode=mode, slots=slots, key=key)
        return output.trace.selected, output.trace.overflow

    routed_LxN, overflow_LxN = jax.device_get(jax.jit(trace)(run.params, jnp.array(ids, jnp.int32)))
    names = [f"block {number + 1}" for number in routed_blocks(run.config.model, routing)]
    return Routes(token_pieces(run.tokenizer, ids), routed_LxN, names, int(overflow_LxN.sum()))


def token_pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text; its spelling if that is nothing, or part of a character."""
    stream = StreamDecoder(tokenizer)
    pieces = []
    for token in ids:
        piece, alone = stream.push(token), tokenizer.decode([token])
        whole = piece and alone and "\ufffd" not in alone
        pieces.append(piece if whole else tokenizer.token_text(token))
    return pieces

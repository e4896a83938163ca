"""Which products of a backward pass a run needs: gradients of frozen weights are left out (`mod_star.trainable`).

The backward pass of a product with a weight has two products, one for the gradient of its input and one for that of the
weight. A frozen weight has the first alone; and where nothing before it is trained, it has neither.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import jax

from mod_star.config import RunConfig
from mod_star.initial_params import initial_params
from mod_star.model import Decoder
from mod_star.model.lora import target_paths
from mod_star.model.parts import DEFAULT_PARTS, Parts
from mod_star.model.routing import routed_share
from mod_star.tokenization import ByteTokenizer
from mod_star.trainable import Names, leaves_by_path, trained_paths, trains_all


@dataclass(frozen=True)
class TrainedShare:
    """What of a model is trained, as far as the operations of a backward pass depend on it."""

    shares: dict[str, float] = field(default_factory=dict)
    """By kind (the fields of `mod_star.flops.Flops`) the share of the operations whose weights are trained. Kinds that
    are left out: all of them."""
    through_blocks: bool = True
    """Whether the gradient goes back through the blocks."""
    to_hidden: bool = True
    """Whether it goes back to the last hidden states."""
    adapters: float = 0.0
    """Operations of the adapters for each one of the blocks' own matrices."""

    def of(self, kind: str) -> float:
        """The share of a kind."""
        return self.shares.get(kind, 1.0)


ALL_TRAINED = TrainedShare()


def trained_share(run: RunConfig, parts: Parts) -> TrainedShare:
    """What a run trains, adapters included.

    Shares are weighed by the tokens that blocks compute of a text: of routed ones, their capacity.

    Raises:
      InputError: a pattern of `train.trainable` matches nothing.
    """
    if trains_all(run):
        return ALL_TRAINED
    decoder = Decoder(run.model, run.routing, parts)
    shapes = jax.eval_shape(lambda: initial_params(decoder, run, ByteTokenizer()))
    trained = trained_paths(run, shapes)
    adapted = target_paths(run.lora, shapes) if run.lora.rank else frozenset()
    whole: Counter[str] = Counter()
    some: Counter[str] = Counter()
    tokens = routed_share(run.routing, run.model.context) if run.routing.every else 1.0
    for names, leaf in leaves_by_path(shapes).items():
        kind = _kind(names, run, parts)
        if kind is not None:
            size = leaf.size * (tokens if "routed" in names and "block" in names else 1.0)
            whole[kind] += size
            some[kind] += size * (names in trained or (names in adapted and _is_merged(names, parts)))
    through_blocks = any(_is_in_stream(names) for names in trained)
    to_hidden = through_blocks or any(names[0] in ("final_norm", "thinking") for names in trained)
    shares = {kind: some[kind] / whole[kind] for kind in whole if kind != "adapters"}
    of_blocks = max(1.0, whole["projections"] + whole["mlp"])
    return TrainedShare(shares, through_blocks, to_hidden, whole["adapters"] / of_blocks)


def _is_merged(names: Names, parts: Parts) -> bool:
    """Whether a weight and its adapter are made one matrix where they are used, which then has a gradient."""
    own_layer = "feed_forward" in names and parts.feed_forward is not DEFAULT_PARTS.feed_forward
    return parts.block is not DEFAULT_PARTS.block or own_layer


def _kind(names: Names, run: RunConfig, parts: Parts) -> str | None:
    """The field of `Flops` that counts a parameter's products; None: it has none, or they are not counted."""
    if names[0] == "lora":
        return "adapters"
    if "block" in names:
        if parts.block is not DEFAULT_PARTS.block or "feed_forward" in names:
            return "mlp"
        return "projections" if names[-1] in ("query", "key", "value", "output") else None
    kinds = {"adapter": "skip", "router": "router", "predictor": "predictor", "mixing": "mixing", "decider": "mixing"}
    for name, kind in kinds.items():
        if name in names:
            return kind
    return "head" if names == ("embedding" if run.model.tie_embeddings else "head",) else None


def _is_in_stream(names: Names) -> bool:
    """Whether a parameter's gradient comes through the blocks. A causal rule's and a decider's do not: their input is
    detached."""
    if names[0] == "thinking":
        return "mixing" not in names and "decider" not in names
    return names[0] in ("embedding", "lora") or (names[0] == "groups" and "predictor" not in names)

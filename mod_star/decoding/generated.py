"""The result of generating from a prompt, as plain Python values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from mod_star.decoding.caches import RoutedCache
from mod_star.decoding.confidence import TokenConfidence
from mod_star.decoding.state import DecodeState
from mod_star.decoding.think import ThoughtRecord


@dataclass(frozen=True)
class Generated:
    """What became of one prompt."""

    tokens: list[int]
    """New tokens, without the end token."""
    log_probs: list[float]
    """Their log-probabilities in nats under the model (temperature 1, all tokens), mixed where it thought."""
    finished: bool
    """Whether it ended by itself, with an end token."""
    routed_fraction: list[float]
    """Share of prompt and new tokens that each routed block computed; empty for a dense model."""
    overflow: int
    """Times a token passed by because a routed block had no slot left, over all routed blocks. Thoughts don't count."""
    gaps: list[float]
    """For each token, probability of the best token less that of the second best at its step, under the same
    distribution as `log_probs`. What CoT-decoding calls confidence."""
    end_log_prob: float | None = None
    """The log-probability of the end token; None if the row did not end by itself."""
    end_gap: float | None = None
    """The gap at the end token."""
    confidences: list[float] = field(default_factory=list)
    """Token confidence of each token in nats, see `mod_star.decoding.confidence`. Empty if not asked for, as the
    next."""
    certainties: list[float] = field(default_factory=list)
    """Self-certainty of each token in nats."""
    entropies: list[float] = field(default_factory=list)
    """Entropy in nats of the prediction of each token without a thought. Empty if it never thinks, as the next two."""
    thoughts: list[list[int] | None] = field(default_factory=list)
    """The thought before each token, without <start> and <end>; None where it didn't think, [] for pauses."""
    mixing_weights: list[float | None] = field(default_factory=list)
    """Weight of the prediction after the thought; None where it didn't think."""


def results_of(state: DecodeState, end_ids: Sequence[int]) -> list[Generated]:
    """What has been generated up to now, row by row; rows that only fill up the batch are left out."""
    tokens, log_probs, gaps, lengths, count = jax.device_get(
        (state.tokens_BxT, state.log_probs_BxT, state.gaps_BxT, state.lengths_B, state.count)
    )
    record, confidence = jax.device_get((state.record, state.confidence))
    routed = [c for c in state.caches if isinstance(c, RoutedCache)]
    counts = np.array(jax.device_get([cache.count_B for cache in routed])).reshape(len(routed), len(tokens))
    overflow = np.array(jax.device_get([cache.overflow_B for cache in routed])).reshape(len(routed), len(tokens))
    results = []
    for row in range(int(count) * state.branches):
        new = tokens[row][tokens[row] >= 0].tolist()
        ended = bool(new) and new[-1] in end_ids
        seen = int(lengths[row]) + len(new) - ended
        results.append(
            Generated(
                tokens=new[:-1] if ended else new,
                log_probs=log_probs[row][: len(new) - ended].tolist(),
                gaps=gaps[row][: len(new) - ended].tolist(),
                end_log_prob=float(log_probs[row][len(new) - 1]) if ended else None,
                end_gap=float(gaps[row][len(new) - 1]) if ended else None,
                finished=ended,
                routed_fraction=(counts[:, row] / seen).tolist() if routed else [],
                overflow=int(overflow[:, row].sum()) if routed else 0,
                **confidence_of_row(confidence, row, len(new) - ended),
                **thought_of_row(record, row, len(new) - ended),
            )
        )
    return results


def confidence_of_row(confidence: TokenConfidence | None, row: int, count: int) -> dict[str, Any]:
    """The fields of `Generated` about how sure the model was of a row's tokens; `confidence` is of NumPy arrays."""
    if confidence is None:
        return {}
    return {
        "confidences": confidence.confidences_BxT[row, :count].tolist(),
        "certainties": confidence.certainties_BxT[row, :count].tolist(),
    }


def thought_of_row(record: ThoughtRecord | None, row: int, count: int) -> dict[str, Any]:
    """The fields of `Generated` about the first `count` tokens of a row; `record` is of NumPy arrays."""
    if record is None or not record.may_think_BxT.any():  # no row might think
        return {}
    entropies, thinks, thoughts, weights = (
        array[row, :count].tolist()
        for array in (record.entropies_BxT, record.thinks_BxT, record.thoughts_BxTxN, record.weights_BxT)
    )
    return {
        "entropies": entropies,
        "thoughts": [
            [token for token in tokens if token >= 0] if thought else None
            for tokens, thought in zip(thoughts, thinks, strict=True)
        ],
        "mixing_weights": [weight if thought else None for weight, thought in zip(weights, thinks, strict=True)],
    }

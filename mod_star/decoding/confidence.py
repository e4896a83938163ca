"""How sure a model is along a path, read from the logits that generating computes anyway: DeepConf and self-certainty.

A step keeps two float32 numbers per row. From those of a path come the token confidence and the group confidences of
DeepConf (Fu et al., arXiv 2508.15260) and self-certainty (Kang et al., arXiv 2502.18581). All are
of the model's own distribution (temperature 1, all tokens; mixed, after a thought); the larger, the surer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import struct

from mod_star.decoding.largest import largest
from mod_star.decodings import WINDOW
from mod_star.errors import require

CANDIDATES = 20
"""How many of the most probable tokens DeepConf's token confidence is a mean over, the paper's k."""
BOTTOM = 0.1
"""Share of a path's groups that `PathConfidence.bottom_groups` is a mean over."""


@struct.dataclass
class TokenConfidence:
    """How sure the model is of each token; of a batch [B, T], or of one step with T left out."""

    confidences_BxT: jax.Array
    """float32 token confidence of DeepConf: -(1/k) Σ log p over the k = 20 most probable tokens, in nats."""
    certainties_BxT: jax.Array
    """float32 self-certainty: -(1/V) Σ log(V p) over all V tokens, in nats. 0: all are equally probable."""


def no_confidence(rows: int, new_tokens: int) -> TokenConfidence:
    """What there is before the first token."""
    none = jnp.zeros((rows, new_tokens), jnp.float32)
    return TokenConfidence(none, none)


def token_confidence(logits_BxV: jax.Array) -> TokenConfidence:
    """The step's numbers, float32 B each; of fewer than 20 tokens all are candidates."""
    V = logits_BxV.shape[-1]
    logits_BxV = logits_BxV.astype(jnp.float32)
    highest_B = jnp.max(logits_BxV, -1)
    # Of the differences: the means of large logits would lose digits. No log-probability is written to memory.
    below_BxV = logits_BxV - highest_B[:, None]
    log_sum_B = jnp.log(jnp.sum(jnp.exp(below_BxV), -1))
    best_BxK = largest(logits_BxV, min(CANDIDATES, V)) - highest_B[:, None]
    return TokenConfidence(
        log_sum_B - jnp.mean(best_BxK, -1), log_sum_B - jnp.mean(below_BxV, -1) - jnp.log(jnp.float32(V))
    )


@dataclass(frozen=True)
class TrueQuestion:
    """P(True)'s question after a path, and the two answers to it whose probabilities are compared."""

    text: str = "\nIs the proposed answer:\n (A) True\n (B) False\nThe proposed answer is:"
    """What stands after the path, for a chat model too: its own turn goes on."""
    true: str = " (A)"
    """The answer that says that the path is right."""
    false: str = " (B)"
    """The answer that says that it is wrong."""


@dataclass(frozen=True)
class ConfidenceConfig:
    """Which confidences of a path are measured.

    Raises:
      InputError: the group size is not positive.
    """

    window: int = WINDOW
    """Tokens of a group. DeepConf has 2048 for paths of tens of thousands of tokens."""
    p_true: TrueQuestion | None = None
    """Ask the model in a second question whether each path is right; None: not. Takes a prefill of each path."""

    def __post_init__(self) -> None:
        require(self.window >= 1, "window", self.window, "must be at least 1")


@dataclass(frozen=True)
class PathConfidence:
    """DeepConf's confidences of a path, and its self-certainty; the end token does not count."""

    mean: float
    """Of the token confidences: the average trace confidence."""
    lowest_group: float
    """The least group confidence. A group is a window of `window` tokens; a shorter path is one group."""
    bottom_groups: float
    """Mean of the lowest 10 % of the group confidences, at least of one."""
    tail: float
    """Mean over the last `window` tokens."""
    self_certainty: float
    """Mean self-certainty of the tokens."""


def group_confidences(confidences: Sequence[float], window: int) -> npt.NDArray[np.float64]:
    """The mean of every window of `window` tokens, in order; of fewer tokens that of all.

    Raises:
      ValueError: there are no tokens.
    """
    if not confidences:
        raise ValueError("a path without tokens has no groups")
    windows = np.lib.stride_tricks.sliding_window_view(
        np.asarray(confidences, np.float64), min(window, len(confidences))
    )
    means: npt.NDArray[np.float64] = windows.mean(-1)
    return means


def path_confidence(
    confidences: Sequence[float], certainties: Sequence[float], window: int = WINDOW
) -> PathConfidence | None:
    """The confidences of a path from those of its tokens; None: it has no token, or nothing was measured."""
    if not confidences:
        return None
    groups = np.sort(group_confidences(confidences, window))
    return PathConfidence(
        mean=float(np.mean(confidences)),
        lowest_group=float(groups[0]),
        bottom_groups=float(np.mean(groups[: max(1, int(BOTTOM * len(groups)))])),
        tail=float(np.mean(confidences[-window:])),
        self_certainty=float(np.mean(certainties)),
    )

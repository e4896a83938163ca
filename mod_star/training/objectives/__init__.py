"""What training minimises: next-token prediction, Quiet-STaR, or what a user's `Parts.objective` makes.

Import `Objective`, `objective_of`, `next_token`, `quiet_star` and `forward` from here.
"""

from __future__ import annotations

from collections.abc import Callable

from mod_star.config import RunConfig
from mod_star.model import Decoder
from mod_star.training.objectives.next_token import forward, next_token
from mod_star.training.objectives.objective import (
    Batch,
    Metrics,
    Objective,
    checked,
    require_agreement,
    with_adapted_params,
)
from mod_star.training.objectives.quiet_star import quiet_star

__all__ = ["OBJECTIVES", "Batch", "Metrics", "Objective", "forward", "next_token", "objective_of", "quiet_star"]

OBJECTIVES: dict[str, Callable[[Decoder, RunConfig], Objective]] = {"next_token": next_token, "quiet_star": quiet_star}
"""By `train.objective`."""


def objective_of(decoder: Decoder, run: RunConfig) -> Objective:
    """The objective in force: the decoder's own (`Parts.objective`), or the one that `train.objective` names.

    Its functions take parameters with adapters, see `with_adapted_params`.

    Raises:
      InputError: the decoder is not the run's, or the run has several capacities; a user's function gives no objective.
    """
    if decoder.parts.objective is None:
        return with_adapted_params(OBJECTIVES[run.train.objective](decoder, run), run)
    require_agreement(decoder, run)
    return with_adapted_params(checked(decoder.parts.objective(decoder, run)), run)

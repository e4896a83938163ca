"""What branches are ranked by: functions from a `Branch` to a number, the larger the better.

A ranking of your own is such a function, or a `Ranking` if an answer's total is not the sum over its branches:

    cot_decode(...)[0].answer(lambda branch: -len(branch.completion.tokens))    the shortest branch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mod_star.errors import InputError, require
from mod_star.user_code import load_from_file

if TYPE_CHECKING:
    from mod_star.decoding.branches import Branch

Score = Callable[["Branch"], float | None]
"""A function from a branch to the number that it is ranked by, or None for some that were dropped."""


@dataclass(frozen=True)
class Ranking:
    """A score with what belongs to it."""

    score: Score
    """Pure: of a branch alone."""
    name: str
    """What JSON and the command line call it."""
    symbol: str
    """What tables call it."""
    total: Callable[[Sequence[float]], float] = math.fsum
    """What the branches of one answer have together."""
    total_symbol: str = "Σ"
    """What tables call that."""

    def of(self, branch: Branch) -> float:
        """The score of a branch that counts.

        Raises:
          InputError: the function gives no number.
        """
        score = self.score(branch)
        if score is None or math.isnan(score):
            raise InputError(f"ranking {self.name} = {score!r}: must be a number for every branch with an answer")
        return score


def delta(branch: Branch) -> float | None:
    """CoT-decoding's Δ: how sure the model is of the answer (section 2.2 of the paper)."""
    return branch.delta


def log_prob(branch: Branch) -> float:
    """Log-probability of the whole branch."""
    return branch.log_prob


def normalised_log_prob(branch: Branch) -> float:
    """Log-probability per token."""
    return branch.normalised_log_prob


def log_sum_exp(scores: Sequence[float]) -> float:
    """The log of the summed probabilities: a sum of log-probabilities would punish an answer for every branch."""
    return float(np.logaddexp.reduce(scores))


DELTA = Ranking(delta, "delta", "Δ", total_symbol="ΣΔ")
LOG_PROB = Ranking(log_prob, "log_prob", "log p", log_sum_exp, "log Σ exp(log p)")
NORMALISED_LOG_PROB = Ranking(
    normalised_log_prob, "normalised_log_prob", "log p/tok", log_sum_exp, "log Σ exp(log p/tok)"
)
RANKINGS: dict[str, Ranking] = {ranking.name: ranking for ranking in (DELTA, LOG_PROB, NORMALISED_LOG_PROB)}
"""The built-in ones, by name."""


def as_ranking(ranking: Ranking | Score) -> Ranking:
    """A ranking, or the one that a function makes: an answer's total is the sum over its branches.

    Raises:
      InputError: it is something else.
    """
    if isinstance(ranking, Ranking):
        return ranking
    require(callable(ranking), "ranking", ranking, "must be a Ranking, or a function from a branch to a number")
    name = getattr(ranking, "__name__", type(ranking).__name__)
    return Ranking(ranking, name, name, total_symbol=f"Σ {name}")


def make_ranking(name: str, option: str = "ranking") -> Ranking:
    """The ranking that a command line names.

    Args:
      name: one of `RANKINGS`, with - for _, or FILE.py:NAME of a function from a branch to a number or of a `Ranking`.
      option: what the user calls it, for error messages.

    Raises:
      InputError: it is neither, or the file fails.
    """
    known = RANKINGS.get(name.replace("-", "_"))
    if known is not None:
        return known
    if ".py:" not in name:
        names = ", ".join(each.replace("_", "-") for each in RANKINGS)
        raise InputError(f"{option} = {name!r}: must be {names}, or FILE.py:NAME")
    ranking = load_from_file(name, option, "a function from a branch to a number")
    if not isinstance(ranking, Ranking) and not callable(ranking):
        raise InputError(f"{option} = {name!r}: must be a function from a branch to a number")
    return as_ranking(ranking)

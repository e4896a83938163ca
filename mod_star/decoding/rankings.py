"""What branches are ranked by: functions from a `Branch` to a number, the larger the better.

A ranking of your own is such a function, or a `Ranking` if an answer's total is not the sum over its branches:

    cot_decode(...)[0].answer(lambda branch: -len(branch.completion.tokens))    the shortest branch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

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
    needs: Literal["confidence", "p_true"] | None = None
    """What it reads of a branch and is only there if asked for: see `mod_star.decoding.confidence.ConfidenceConfig`."""

    def of(self, branch: Branch) -> float:
        """The score of a branch that counts.

        Raises:
          InputError: the function gives no number.
        """
        score = self.score(branch)
        if score is None or math.isnan(score):
            unmeasured = score is None and self.needs is not None
            why = ", and is measured only if ConfidenceConfig asks for it" if unmeasured else ""
            raise InputError(f"ranking {self.name} = {score!r}: must be a number for every branch with an answer{why}")
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


def mean_confidence(branch: Branch) -> float | None:
    """DeepConf's average trace confidence: mean of the token confidences of the whole branch."""
    return None if branch.confidence is None else branch.confidence.mean


def lowest_group(branch: Branch) -> float | None:
    """DeepConf's lowest group confidence: the least mean over `window` tokens in a row."""
    return None if branch.confidence is None else branch.confidence.lowest_group


def bottom_groups(branch: Branch) -> float | None:
    """DeepConf's bottom 10 % group confidence: mean over the lowest tenth of the groups."""
    return None if branch.confidence is None else branch.confidence.bottom_groups


def tail_confidence(branch: Branch) -> float | None:
    """DeepConf's tail confidence: mean over the last `window` tokens."""
    return None if branch.confidence is None else branch.confidence.tail


def self_certainty(branch: Branch) -> float | None:
    """Self-certainty (Kang et al., arXiv 2502.18581): the predictions' distance from uniform ones."""
    return None if branch.confidence is None else branch.confidence.self_certainty


def p_true(branch: Branch) -> float | None:
    """P(True) (Kadavath et al., arXiv 2207.05221): what the model says when asked whether the branch is right."""
    return branch.p_true


def log_sum_exp(scores: Sequence[float]) -> float:
    """The log of the summed probabilities: a sum of log-probabilities would punish an answer for every branch."""
    return float(np.logaddexp.reduce(scores))


DELTA = Ranking(delta, "delta", "Δ", total_symbol="ΣΔ")
LOG_PROB = Ranking(log_prob, "log_prob", "log p", log_sum_exp, "log Σ exp(log p)")
NORMALISED_LOG_PROB = Ranking(
    normalised_log_prob, "normalised_log_prob", "log p/tok", log_sum_exp, "log Σ exp(log p/tok)"
)
OF_CONFIDENCE = (
    Ranking(mean_confidence, "mean_confidence", "C", total_symbol="ΣC", needs="confidence"),
    Ranking(lowest_group, "lowest_group", "C low", total_symbol="ΣC low", needs="confidence"),
    Ranking(bottom_groups, "bottom_groups", "C 10 %", total_symbol="ΣC 10 %", needs="confidence"),
    Ranking(tail_confidence, "tail_confidence", "C tail", total_symbol="ΣC tail", needs="confidence"),
    Ranking(self_certainty, "self_certainty", "certainty", total_symbol="Σ certainty", needs="confidence"),
)
"""Those that one pass measures together, if it is asked to."""
P_TRUE = Ranking(p_true, "p_true", "P(True)", total_symbol="ΣP(True)", needs="p_true")
RANKINGS: dict[str, Ranking] = {ranking.name: ranking for ranking in (DELTA, LOG_PROB, NORMALISED_LOG_PROB)}
"""The built-in ones that every branch has, by name."""
MEASURED: dict[str, Ranking] = {ranking.name: ranking for ranking in (*OF_CONFIDENCE, P_TRUE)}
"""The built-in ones that must be asked for, by name."""


def softmax_weighted(ranking: Ranking | Score, temperature: float) -> Ranking:
    """The same scores, by whose softmax branches are weighed (CISC: Taubenfeld et al., arXiv 2502.06233).

    An answer's total is log Σ exp(c / T) over its branches. The softmax over all branches that count differs from
    exp(c / T) by one factor for all, so the answer with the largest total is that with the largest sum of softmaxes.

    Args:
      ranking: gives c.
      temperature: T. Small: the most confident branch decides. Large: every branch has the same weight.

    Raises:
      InputError: the temperature is below 1e-6 or not finite.
    """
    fine = 1e-6 <= temperature < math.inf
    require(fine, "vote_temperature", temperature, "must be at least 1e-6 and finite")
    ranking = as_ranking(ranking)

    def total(scores: Sequence[float]) -> float:
        return log_sum_exp([score / temperature for score in scores])

    return replace(ranking, total=total, total_symbol=f"log Σ exp({ranking.symbol}/{temperature:g})")


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
      name: one of `RANKINGS` and `MEASURED`, with - for _, or FILE.py:NAME of a function from a branch to
        a number or of a `Ranking`.
      option: what the user calls it, for error messages.

    Raises:
      InputError: it is neither, or the file fails.
    """
    known = (RANKINGS | MEASURED).get(name.replace("-", "_"))
    if known is not None:
        return known
    if ".py:" not in name:
        names = ", ".join(each.replace("_", "-") for each in RANKINGS | MEASURED)
        raise InputError(f"{option} = {name!r}: must be {names}, or FILE.py:NAME")
    ranking = load_from_file(name, option, "a function from a branch to a number")
    if not isinstance(ranking, Ranking) and not callable(ranking):
        raise InputError(f"{option} = {name!r}: must be a function from a branch to a number")
    # A function does not say what it reads: what one pass gives is there for it.
    return ranking if isinstance(ranking, Ranking) else replace(as_ranking(ranking), needs="confidence")

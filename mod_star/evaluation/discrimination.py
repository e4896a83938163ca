"""What paths say of ways to choose among them: whether confidence tells the right ones from the wrong ones of a
question, whether any is right, and what stopping some early would have saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mod_star.decoding.branches import Branch
from mod_star.decoding.rankings import Ranking
from mod_star.evaluation.branch_records import EVERY_RANKING, branches_of
from mod_star.evaluation.generation import STOPPED_EARLY as EARLY
from mod_star.evaluation.intervals import Estimate, accuracy, paired_difference, ratio
from mod_star.evaluation.records import Record

ANY_RIGHT = "any branch right"
"""The measure that no way to choose among the branches can exceed."""


def discrimination(records: Sequence[Record]) -> dict[str, Estimate]:
    """Within-question discrimination of every ranking that the records hold (Taubenfeld et al., arXiv 2502.06233).

    The share of pairs of a right and a wrong branch of the same question of which the right one has the larger score.
    0.5 is chance. A tie counts half. Branches that were dropped are in no pair. The interval resamples questions, for
    the pairs of one are not independent.

    Args:
      records: of any protocol; those without branches, or with right or wrong ones only, have no pairs.

    Returns:
      By the name of the ranking, Δ first; `n` is the number of questions that have pairs. Empty if none has.
    """
    ordered = sorted(records, key=lambda record: record["id"])  # the bootstrap depends on the order
    questions = []
    for record in ordered:
        branches = branches_of(record.get("branches", []))
        counting = [branches.branches[index] for index in branches.counting]
        right = [branch for branch in counting if branch.answer == record["gold"]]
        wrong = [branch for branch in counting if branch.answer != record["gold"]]
        if right and wrong:
            questions.append((right, wrong))
    estimates = {}
    for name, ranking in EVERY_RANKING.items():
        if questions and all(_has(ranking.score, branch) for pair in questions for side in pair for branch in side):
            wins = [_wins(ranking, right, wrong) for right, wrong in questions]
            estimates[name] = ratio(wins, [len(right) * len(wrong) for right, wrong in questions])
    return estimates


def any_right(records: Sequence[Record]) -> Estimate | None:
    """The share of questions of which a branch that was not dropped is right; None: no record has several branches."""
    if not any(len(record.get("branches", [])) > 1 for record in records):
        return None
    return accuracy(
        [
            any(branch["dropped"] is None and branch["answer"] == record["gold"] for branch in record["branches"])
            for record in records
        ]
    )


def early_stop_gain(records: Sequence[Record]) -> dict[str, Estimate]:
    """What stopping samples early would have saved and cost: `tokens saved`, the share of all tokens, and
    `accuracy gained`, the paired difference to the same samples without it. Empty if no record says so."""
    ordered = sorted(
        (each for each in records if each.get("tokens_early") is not None and each["tokens"] > 0),
        key=lambda record: record["id"],
    )
    if not ordered:
        return {}
    saved = [record["tokens"] - record["tokens_early"] for record in ordered]
    whole, early = ([float(record["scores"][name]) for record in ordered] for name in ("self-consistency", EARLY))
    return {
        "tokens saved": ratio(saved, [record["tokens"] for record in ordered]),
        "accuracy gained": paired_difference(whole, early),
    }


def _has(score: Callable[[Branch], float | None], branch: Branch) -> bool:
    return score(branch) is not None


def _wins(ranking: Ranking, right: Sequence[Branch], wrong: Sequence[Branch]) -> float:
    """Pairs in which the right branch has the larger score, ties as halves."""
    pairs = [(ranking.of(a), ranking.of(b)) for a in right for b in wrong]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)

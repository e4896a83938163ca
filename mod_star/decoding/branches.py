"""Which of a prompt's branches answers best: CoT-decoding's Δ and other rankings, maximum, sum and vote.

Wang and Zhou, arXiv 2402.10200. All of it is arithmetic on what was generated; `mod_star.decoding.cot` generates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mod_star.decoding.answers import Finder, Span, tokens_of_span
from mod_star.decoding.confidence import PathConfidence, path_confidence
from mod_star.decoding.rankings import DELTA, Ranking, Score, as_ranking
from mod_star.decoding.text import Completion
from mod_star.decodings import WINDOW
from mod_star.errors import require


@dataclass(frozen=True)
class Branch:
    """One branch (or sample) with its answer."""

    completion: Completion
    """What was generated."""
    first_token: str
    """The first token in printable form; "" if there is none."""
    span: Span | None
    """Characters of the answer in `completion.text`."""
    answer: str | None
    """The answer in canonical form; for a dropped branch what there is of it."""
    delta: float | None
    """Δ: mean over the tokens of the answer of p(best token) - p(second best); None without an answer in the text."""
    log_prob: float
    """Sum of the log-probabilities of its tokens, the end token included, in nats."""
    normalised_log_prob: float
    """The same per token."""
    dropped: str | None = None
    """Why it doesn't count; None: it does."""
    continuation: str | None = None
    """What the model answered when the branch was continued with "So the answer is"."""
    confidence: PathConfidence | None = None
    """How sure the model was along the branch; None: not asked for, or there is no token."""
    p_true: float | None = None
    """P(True): how probable the model says it is that the branch is right; None: not asked for, or it was dropped."""


@dataclass(frozen=True)
class Branches:
    """All branches of a prompt, the most probable first token first; or the samples of self-consistency."""

    prompt: str
    branches: list[Branch]

    def first(self, count: int) -> Branches:
        """What branching on fewer tokens would have given: the first `count` branches."""
        require(1 <= count <= len(self.branches), "branches", count, f"must lie in [1, {len(self.branches)}]")
        return replace(self, branches=self.branches[:count])

    def keep(self, share: float, ranking: Ranking | Score = DELTA) -> Branches:
        """The same, of which only the highest ranked branches count, as DeepConf filters (arXiv 2508.15260).

        Args:
          share: of the branches that count now, in (0, 1], rounded up; of equals the first are kept.
          ranking: what they are ranked by.

        Returns:
          All branches; the others are dropped.
        """
        require(0 < share <= 1, "keep", share, "must lie in (0, 1]")
        score, counting = as_ranking(ranking).of, self.counting
        ranked = sorted(counting, key=lambda index: -score(self.branches[index])) if share < 1 else counting
        kept = {*ranked[: math.ceil(share * len(ranked) - 1e-9)]}  # 0.07 x 100 is more than 7 in floats
        why = f"not among the {100 * share:g} % ranked highest"
        return replace(
            self,
            branches=[
                replace(branch, dropped=why) if index in counting and index not in kept else branch
                for index, branch in enumerate(self.branches)
            ],
        )

    @property
    def counting(self) -> list[int]:
        """Indices of the branches that were not dropped."""
        return [index for index, branch in enumerate(self.branches) if branch.dropped is None]

    def max_path(self, ranking: Ranking | Score = DELTA) -> int | None:
        """Index of the branch with the largest score, the first of equals; None if all were dropped."""
        score = as_ranking(ranking).of
        scores = [score(self.branches[index]) for index in self.counting]
        return self.counting[int(np.argmax(scores))] if scores else None

    def totals(self, ranking: Ranking | Score = DELTA) -> dict[str, float]:
        """What the branches of each answer have together, answers in the order of their first branch.

        ΣΔ; for the log-probability rankings, whose sum would punish an answer for every branch that gives it, the
        log of the summed probabilities (per token: of the mean probability); for a function of your own the sum.
        """
        ranking = as_ranking(ranking)
        groups: dict[str, list[float]] = {}
        for index in self.counting:
            branch = self.branches[index]
            assert branch.answer is not None
            groups.setdefault(branch.answer, []).append(ranking.of(branch))
        return {answer: ranking.total(scores) for answer, scores in groups.items()}

    def aggregated_answer(self, ranking: Ranking | Score = DELTA) -> str | None:
        """The answer with the largest total; of equals, the one with the first branch."""
        return _largest(self.totals(ranking))

    def votes(self) -> dict[str, int]:
        """How many branches give each answer, in the order of their first branch."""
        votes: dict[str, int] = {}
        for index in self.counting:
            answer = self.branches[index].answer
            assert answer is not None
            votes[answer] = votes.get(answer, 0) + 1
        return votes

    def majority_answer(self) -> str | None:
        """The answer that most branches give (self-consistency); of equals, the one that came first."""
        return _largest(self.votes())

    def answer(self, ranking: Ranking | Score = DELTA, aggregate: bool = False) -> str | None:
        """The answer of the max path, or the aggregated one; None if all branches were dropped."""
        if aggregate:
            return self.aggregated_answer(ranking)
        best = self.max_path(ranking)
        return None if best is None else self.branches[best].answer

    def representative(self, answer: str, ranking: Ranking | Score = DELTA) -> int:
        """Index of the branch with the largest score among those that give `answer`."""
        score = as_ranking(ranking).of
        same = [index for index in self.counting if self.branches[index].answer == answer]
        return max(same, key=lambda index: score(self.branches[index]))


def _largest(totals: dict[str, float] | dict[str, int]) -> str | None:
    return max(totals, key=lambda answer: totals[answer]) if totals else None


def answer_delta(gaps: Sequence[float], tokens: Sequence[int], skip_first: bool = False) -> float:
    """Δ, the mean gap over the tokens of an answer.

    The first token of a branch is not the model's choice but the branch's: where it is in the answer, its gap is that
    of the distribution all branches share, which says nothing about this one.

    Args:
      gaps: p(best) - p(second best) at each token of the branch.
      tokens: indices of the answer's tokens.
      skip_first: leave the first token of the branch out. An answer that is nothing but that token then has Δ 0: no
        evidence.
    """
    counted = [gaps[token] for token in tokens if token > 0 or not skip_first]
    return math.fsum(counted) / len(counted) if counted else 0.0


def ill_formed(completion: Completion) -> str | None:
    """Why a branch is no candidate, whatever it answers: empty, cut by the length limit, or ending in "?"."""
    if not completion.text.strip():
        return "empty"
    if completion.finished not in ("end", "stop"):
        return "cut by the length limit"
    if completion.text.rstrip().endswith("?"):
        return "ends in a question mark"
    return None


def read_branch(
    completion: Completion,
    first_token: str,
    finder: Finder,
    skip_first: bool = False,
    continuation: str | None = None,
    window: int = WINDOW,
) -> Branch:
    """Finds the answer of a branch and scores it.

    Args:
      completion: what was generated, with its gaps.
      first_token: of the branch, in printable form.
      finder: of the kind of answer.
      skip_first: see `answer_delta`.
      continuation: what followed "So the answer is"; its first answer is the branch's, aligned to the last place in
        the branch where it stands. None: the last answer in the branch itself.
      window: tokens of a group, see `mod_star.decoding.confidence`.
    """
    dropped = ill_formed(completion)
    text = completion.text
    if continuation is None:
        span = finder.find(text)
        answer = None if span is None else finder.spell(text[span[0] : span[1]])
        missing = "no answer in it"
    else:
        place = finder.find_first(continuation)
        answer = None if place is None else finder.spell(continuation[place[0] : place[1]])
        span = None if answer is None else finder.align(text, answer)
        missing = "the continuation gives no answer" if answer is None else "the continuation's answer is not in it"
    delta = None
    if span is not None:
        delta = answer_delta(completion.gaps, tokens_of_span(completion.starts, span, len(text)), skip_first)
    elif dropped is None:
        dropped = missing
    log_prob, normalised = completion.path_log_prob()
    confidence = path_confidence(completion.confidences, completion.certainties, window)
    return Branch(
        completion, first_token, span, answer, delta, log_prob, normalised, dropped, continuation, confidence
    )  # fmt: skip

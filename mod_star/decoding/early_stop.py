"""Samples of self-consistency that are not generated to their end: DeepConf online, and votes that are decided.

DeepConf (Fu et al., arXiv 2508.15260): some samples are generated to their end, and their lowest group confidences set
a threshold. After them a sample stops where the confidence in a group falls below it. A vote is decided when what is
still being generated cannot change the majority. Both are looked at between bursts of tokens. With a warm-up the
prompts are computed twice: for the samples that warm up, and for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mod_star.decoding.branches import Branch, Branches, read_branch
from mod_star.decoding.confidence import group_confidences
from mod_star.decoding.finder import Finder
from mod_star.decoding.text import Completion
from mod_star.decodings import STOPPED, WINDOW
from mod_star.errors import require

BURST = 16
"""Tokens between two looks."""
DECIDED = f"{STOPPED}: the vote was decided"
UNSURE = f"{STOPPED}: its confidence fell below the threshold"


@dataclass(frozen=True)
class EarlyStop:
    """When samples stop.

    Raises:
      InputError: a number is out of its range, or nothing would ever stop.
    """

    warm_up: int = 0
    """Samples of each prompt that are generated to their end first; 0: there is no threshold."""
    keep: float = 0.9
    """Share of them whose lowest group confidence is at least the threshold, η of DeepConf, in (0, 1]."""
    decided: bool = True
    """Stop all samples of a prompt when its majority is decided, for equal votes."""

    def __post_init__(self) -> None:
        require(self.warm_up >= 0, "warm_up", self.warm_up, "must be at least 0")
        require(0 < self.keep <= 1, "keep", self.keep, "must lie in (0, 1]")
        require(self.warm_up > 0 or self.decided, "warm_up", 0, "must be positive where decided is False")

    def threshold(self, warm_up: Sequence[Branch]) -> float | None:
        """The group confidence that a sample must keep, the (1 - keep) quantile; None: nothing was measured."""
        lowest = [branch.confidence.lowest_group for branch in warm_up if branch.confidence is not None]
        return float(np.quantile(lowest, 1 - self.keep)) if lowest else None


@dataclass
class Watch:
    """The samples of one prompt that are generated after the warm-up."""

    rule: EarlyStop
    finder: Finder
    warm_up: Sequence[Branch]
    """Samples that were generated before; they vote, too."""
    window: int = WINDOW
    reasons: dict[int, str] = field(default_factory=dict)
    """Why a sample was stopped, by its index among those that are watched."""

    def __post_init__(self) -> None:
        self._threshold = self.rule.threshold(self.warm_up)
        self._votes = Counter(branch.answer for branch in self.warm_up if branch.dropped is None)
        self._counted: set[int] = set()

    def stops(self, completions: Sequence[Completion]) -> list[bool]:
        """Which of the samples are to stop here, or have been stopped; `completions` are what they have come to."""
        running = [
            index
            for index, each in enumerate(completions)
            if each.finished is None and index not in self.reasons
        ]  # fmt: skip
        if self._threshold is not None:
            for index in list(running):
                if self._falls_below(completions[index].confidences, self._threshold):
                    self.reasons[index] = UNSURE
                    running.remove(index)
        if self.rule.decided:
            self._count(completions)
            first, second = [*(count for _, count in self._votes.most_common(2)), 0, 0][:2]
            if first - second > len(running):
                self.reasons |= dict.fromkeys(running, DECIDED)
        return [index in self.reasons for index in range(len(completions))]

    def branch(self, index: int, branch: Branch) -> Branch:
        """A sample as it counts in the end: one that was stopped is dropped."""
        return replace(branch, dropped=self.reasons[index]) if index in self.reasons else branch

    def _falls_below(self, confidences: Sequence[float], threshold: float) -> bool:
        if len(confidences) < self.window:
            return False
        return bool(group_confidences(confidences, self.window).min() < threshold)

    def _count(self, completions: Sequence[Completion]) -> None:
        """Counts the votes of samples that have come to their end."""
        for index, completion in enumerate(completions):
            if completion.finished is not None and index not in self._counted and index not in self.reasons:
                self._counted.add(index)
                branch = read_branch(completion, "", self.finder)
                if branch.dropped is None:
                    self._votes[branch.answer] += 1


@dataclass(frozen=True)
class Replay:
    """What stopping early would have come to."""

    branches: Branches
    """The samples; those that would have been stopped are dropped, with what they came to later."""
    tokens: int
    """Tokens that would have been generated, end tokens left out."""
    all_tokens: int
    """Tokens of all samples to their end."""


def replay(result: Branches, rule: EarlyStop, finder: Finder, window: int = WINDOW, burst: int = BURST) -> Replay:
    """Stops samples that were generated to their end, as `self_consistency(..., early_stop=rule)` would have.

    Args:
      result: of one prompt, with confidences if there is a warm-up.
      rule: when samples stop.
      finder: of the kind of answer.
      window: tokens of a group.
      burst: tokens between two looks.
    """
    warm_up, rest = result.branches[: rule.warm_up], result.branches[rule.warm_up :]
    watch = Watch(rule, finder, warm_up, window)
    tokens = [len(branch.completion.tokens) for branch in rest]
    for until in range(burst, max(tokens, default=0) + burst + 1, burst):
        before = set(watch.reasons)
        watch.stops([_cut(branch.completion, until) for branch in rest])
        for index in set(watch.reasons) - before:
            tokens[index] = until
    whole = sum(len(branch.completion.tokens) for branch in warm_up)
    counted = [*warm_up, *(watch.branch(index, branch) for index, branch in enumerate(rest))]
    total = sum(len(branch.completion.tokens) for branch in result.branches)
    return Replay(replace(result, branches=counted), whole + sum(tokens), total)


def _cut(completion: Completion, steps: int) -> Completion:
    """What a completion had come to after so many steps, of which the end token is one."""
    if steps >= len(completion.tokens) + (completion.finished == "end"):
        return completion
    return replace(
        completion, tokens=completion.tokens[:steps], confidences=completion.confidences[:steps], finished=None
    )

"""Samples that stop early: the rule by brute force, and the real thing against a replay of whole samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from decoding_models import make_prompts
from some_nightly import some_nightly
from symbols import SYMBOLS, Subject, SymbolTokenizer

from mod_star.decoding import Completion, GenerationConfig, Sampling
from mod_star.decoding.answers import LastNumber
from mod_star.decoding.branches import Branches, read_branch
from mod_star.decoding.confidence import ConfidenceConfig
from mod_star.decoding.cot import self_consistency
from mod_star.decoding.early_stop import DECIDED, UNSURE, EarlyStop, Watch, replay
from mod_star.errors import InputError

NUMBER = LastNumber()


def sample(text: str, finished: Any = "end", confidences: list[float] | None = None) -> Completion:
    given = [9.0] * len(text) if confidences is None else confidences
    return Completion(
        prompt="", text=text, tokens=[0] * len(given), log_probs=[-0.1] * len(given), finished=finished,
        routed_fraction=[], overflow=0, gaps=[0.5] * len(given), starts=list(range(len(given))), confidences=given,
        certainties=given,
    )  # fmt: skip


def warm_up(*lowest: float) -> list[Any]:
    return [read_branch(sample("5", confidences=[each]), "", NUMBER) for each in lowest]


@pytest.mark.parametrize(("keep", "threshold"), [(1.0, 1.0), (0.75, 2.0), (0.5, 3.0), (0.1, 4.6)])
def test_a_sample_stops_where_a_group_falls_below_the_threshold(keep: float, threshold: float) -> None:
    rule = EarlyStop(5, keep, decided=False)
    first = warm_up(3, 1, 5, 2, 4)
    assert rule.threshold(first) == pytest.approx(threshold)
    watch = Watch(rule, NUMBER, first, window=2)
    just, under = [9.0, threshold - 1, threshold + 1, 9.0], [9.0, threshold - 1, threshold + 0.9, 9.0]
    samples = [sample("1", None, just), sample("1", None, under), sample("1", "end", under), sample("1", None, [0.1])]
    assert watch.stops(samples) == [False, True, False, False], "one that has ended stays, a short one waits"
    assert watch.reasons == {1: UNSURE}
    assert watch.stops([samples[0]] * 4) == [False, True, False, False], "what was stopped stays so"
    stopped = watch.branch(1, read_branch(samples[1], "", NUMBER))
    assert stopped.dropped == UNSURE and watch.branch(0, stopped) is stopped


def test_a_vote_is_decided_when_nothing_that_may_come_can_change_it() -> None:
    checked = Counter[bool]()
    for counts in product(range(4), repeat=3):
        for running in range(1, 4):
            finished = [sample(answer) for answer, count in zip("579", counts, strict=True) for _ in range(count)]
            watch = Watch(EarlyStop(), NUMBER, [])
            stops = watch.stops([*finished, *[sample("", None) for _ in range(running)]])
            majorities = set()
            for more in product("5798", repeat=running):
                votes = Counter({answer: count for answer, count in zip("579", counts, strict=True) if count})
                votes.update(more)
                most = max(votes.values())
                majorities |= {tuple(sorted(answer for answer, count in votes.items() if count == most))}
            decided = len(majorities) == 1
            assert stops == [False] * len(finished) + [decided] * running, (counts, running)
            checked[decided] += 1
    assert checked[True] > 10 < checked[False]


def test_dropped_samples_have_no_vote_and_the_warm_up_does() -> None:
    rule = EarlyStop(2, 1.0)
    watch = Watch(rule, NUMBER, warm_up(3, 3), window=2)
    running = sample("", None)
    assert watch.stops([sample("5", "length"), running, running]) == [False] * 3, "2 to 0, and two may come"
    assert watch.stops([sample("5", "length"), sample("none"), running]) == [False, False, True]
    assert watch.reasons == {2: DECIDED}
    undecided = Watch(replace(rule, decided=False), NUMBER, warm_up(3, 3), window=2)
    assert undecided.stops([sample("5"), sample("5"), running]) == [False] * 3


class Parity(LastNumber):
    """Even or odd: random texts agree on it."""

    def spell(self, answer: str) -> str:
        return str(int(super().spell(answer)[-1]) % 2)


MEASURED = ConfidenceConfig(2)
CONFIG = GenerationConfig(12, Sampling(1.5), branches=8, seed=4, burst=2)
"""Of a dense model of random weights."""


def asked(subject: Subject, config: GenerationConfig, rule: EarlyStop | None = None) -> list[Branches]:
    encoded = [[token % len(SYMBOLS) for token in prompt] for prompt in make_prompts((3, 9, 1))]
    prompts = [SymbolTokenizer().decode(ids) for ids in encoded]
    return self_consistency(
        subject.generator, prompts, config, Parity(), confidence=MEASURED, early_stop=rule, encoded=encoded
    )


@pytest.fixture(scope="module")
def sampled() -> tuple[Subject, list[Branches]]:
    """A model, and whole samples of it."""
    subject = Subject("dense")
    return subject, asked(subject, CONFIG)


UNTIL_UNSURE, UNTIL_DECIDED = EarlyStop(3, 0.5), EarlyStop(0)


@pytest.mark.parametrize(
    ("rule", "rows"),
    some_nightly(
        [(UNTIL_UNSURE, None), (UNTIL_UNSURE, 8), (UNTIL_DECIDED, None)], (UNTIL_UNSURE, 8), (UNTIL_DECIDED, None)
    ),
)
@pytest.mark.slow
def test_the_real_thing_is_the_replay_of_whole_samples(
    rule: EarlyStop, rows: int | None, sampled: tuple[Subject, list[Branches]]
) -> None:
    """The same draws, whoever stops beside a sample."""
    subject, whole = sampled
    early = asked(subject, replace(CONFIG, rows=rows), rule)
    seen = Counter[str | None]()
    for all_of, stopped in zip(whole, early, strict=True):
        expected = replay(all_of, rule, Parity(), 2, burst=2)
        whys = [each.dropped for each in expected.branches.branches]
        assert expected.all_tokens == sum(len(each.completion.tokens) for each in all_of.branches)
        assert [each.dropped for each in stopped.branches] == whys
        assert sum(len(each.completion.tokens) for each in stopped.branches) == expected.tokens
        assert stopped.majority_answer() == expected.branches.majority_answer()
        if rule == UNTIL_DECIDED:
            assert stopped.majority_answer() == all_of.majority_answer(), "decided is decided"
        for each, before in zip(stopped.branches, all_of.branches, strict=True):
            tokens = each.completion.tokens
            assert tokens == before.completion.tokens[: len(tokens)]
            np.testing.assert_allclose(
                each.completion.confidences, before.completion.confidences[: len(tokens)], atol=1e-4
            )
            seen[each.dropped] += 1
    enough = seen[DECIDED] > 0 if rule == UNTIL_DECIDED else seen[UNSURE] >= 5
    assert enough, f"the test shows less than it should: {seen}"


def test_what_is_replayed_costs_what_was_generated_up_to_there() -> None:
    texts = [sample("5"), sample("5" * 40), sample("7" * 3 + " " * 60 + "5", confidences=[9.0] * 20 + [1.0] * 44)]
    result = Branches("", [read_branch(each, "", NUMBER) for each in texts])
    found = replay(result, EarlyStop(1, 1.0, decided=False), NUMBER, window=4, burst=16)
    assert (found.tokens, found.all_tokens) == (1 + 40 + 32, 1 + 40 + 64)
    assert [each.dropped for each in found.branches.branches] == [None, None, UNSURE]
    alike = Branches("", [read_branch(sample("5"), "", NUMBER)] * 2 + [result.branches[1]])
    decided = replay(alike, EarlyStop(0), NUMBER, burst=16)
    assert (decided.tokens, decided.branches.majority_answer()) == (1 + 1 + 16, "5")


def test_bad_rules_are_refused() -> None:
    for fields, message in (
        ({"warm_up": -1}, "warm_up = -1: must be at least 0"),
        ({"keep": 0.0}, r"keep = 0.0: must lie in \(0, 1\]"),
        ({"decided": False}, "warm_up = 0: must be positive where decided is False"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            EarlyStop(**fields)
    generator: Any = None
    for rule, continuation, message in (
        (EarlyStop(4), None, r"early_stop.warm_up = 4: must be less than the number of samples, 4"),
        (EarlyStop(2), "So", r"early_stop.decided = True: must be False with a continuation"),
    ):
        config = GenerationConfig(4, branches=4)
        with pytest.raises(InputError, match=f"^{message}"):
            self_consistency(generator, ["x"], config, NUMBER, continuation=continuation, early_stop=rule)
    for part, sampling in (((0, 5), None), ((2, 2), None), ((-1, 2), None), ((0, 1), Sampling(0, branch=True))):
        with pytest.raises(InputError, match=r"^branch_range = \("):
            GenerationConfig(4, sampling, branches=4, branch_range=part)

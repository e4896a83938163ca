"""Δ, rankings, maximum, sum and vote on hand-built logits and branches; what is dropped, and why."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoding_models import log_softmax

from mod_star.decoding import Completion
from mod_star.decoding.answers import LastNumber, Phrase
from mod_star.decoding.branches import Branch, Branches, answer_delta, read_branch
from mod_star.decoding.rankings import LOG_PROB, MEASURED, RANKINGS, Ranking, make_ranking
from mod_star.errors import InputError

NUMBER = LastNumber()


def completion(pieces: list[str], logits_TxV: np.ndarray | None = None, finished: Any = "end") -> Completion:
    """A text of these tokens, each the most probable one of its logits; the last row is of the end token."""
    N = len(pieces)
    if logits_TxV is None:
        logits_TxV = np.random.default_rng(N).standard_normal((N + 1, 5))
    log_p = log_softmax(logits_TxV)
    p = np.sort(np.exp(log_p), -1)
    gaps = (p[:, -1] - p[:, -2]).tolist()
    starts = np.cumsum([0, *map(len, pieces)])[:-1].tolist()
    ended = finished == "end"
    return Completion(
        prompt="", text="".join(pieces), tokens=list(range(N)), log_probs=log_p.max(-1)[:N].tolist(), finished=finished,
        routed_fraction=[], overflow=0, starts=starts, gaps=gaps[:N], end_gap=gaps[N] if ended else None,
        end_log_prob=float(log_p.max(-1)[N]) if ended else None,
    )  # fmt: skip


def branch(answer: str | None, delta: float | None, log_prob: float = -1.0, length: int = 1) -> Branch:
    empty = completion(["x"])
    return Branch(empty, "x", (0, 1), answer, delta, log_prob, log_prob / length, None if answer else "no answer in it")


def test_delta_is_the_mean_gap_of_the_answers_tokens() -> None:
    # Probabilities 0.5, 0.3, 0.2; then 0.7, 0.2, 0.1; then 0.9, 0.06, 0.04; then the end.
    p = np.array([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.06, 0.04, 0.9], [0.98, 0.01, 0.01]])
    text = completion([" 1", "2", "."], np.log(p) + 5)
    made = read_branch(text, "␣1", NUMBER)
    assert (made.answer, made.span, made.dropped) == ("12", (1, 3), None)
    assert made.delta == pytest.approx((0.2 + 0.5) / 2), "the end and the full stop don't count"
    assert made.log_prob == pytest.approx(np.log([0.5, 0.7, 0.9, 0.98]).sum()), "the end does"
    assert made.normalised_log_prob == pytest.approx(np.log([0.5, 0.7, 0.9, 0.98]).mean())
    skipped = read_branch(text, "␣1", NUMBER, skip_first=True)
    assert skipped.delta == pytest.approx(0.5)
    assert read_branch(completion(["7"], np.log(p[[0, 3]])), "7", NUMBER, True).delta == 0, "no evidence is left"
    stopped = read_branch(replace(text, finished="stop", end_log_prob=None), "␣1", NUMBER)
    assert stopped.log_prob == pytest.approx(np.log([0.5, 0.7, 0.9]).sum())
    assert stopped.normalised_log_prob == pytest.approx(np.log([0.5, 0.7, 0.9]).mean())


def test_delta_on_random_logits() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        numbers = [str(n) for n in rng.integers(0, 10, int(rng.integers(1, 6)))]
        pieces = ["so ", "3", " is ", *numbers, " in all"]
        logits = rng.standard_normal((len(pieces) + 1, 40)) * rng.uniform(0.1, 5)
        p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        gaps = [sorted(row)[-1] - sorted(row)[-2] for row in p]
        made = read_branch(completion(pieces, logits), "so␣", NUMBER)
        assert made.delta == pytest.approx(np.mean(gaps[3:-2]))
        assert answer_delta(gaps, range(len(gaps)), True) == pytest.approx(np.mean(gaps[1:]))


@pytest.mark.parametrize(
    ("pieces", "finished", "why"),
    [
        ([], "end", "empty"),
        ([" ", "\n"], "end", "empty"),
        (["5"], "length", "cut by the length limit"),
        (["5"], None, "cut by the length limit"),
        (["is it 5", "?\n"], "end", "ends in a question mark"),
        (["is it 5", "? no"], "stop", None),
        (["five"], "end", "no answer in it"),
        (["5"], "stop", None),
    ],
)
def test_ill_formed_branches_are_dropped(pieces: list[str], finished: Any, why: str | None) -> None:
    made = read_branch(completion(pieces, finished=finished), "", NUMBER)
    assert made.dropped == why
    assert (made.delta is None) == (made.span is None)


def test_a_continuation_is_aligned_back() -> None:
    text = completion(["It ", "is 7", "0", ", I ", "mean ", "7", "0", ".0", ", of ", "9", "."])
    made = read_branch(text, "It␣", NUMBER, continuation=" 70. Not 9.")
    assert (made.answer, made.span, made.dropped) == ("70", (17, 21), None)
    assert made.delta == pytest.approx(np.mean(text.gaps[5:8]))
    gone = read_branch(text, "It␣", NUMBER, continuation=" 71.")
    assert (gone.answer, gone.dropped) == ("71", "the continuation's answer is not in it")
    none = read_branch(text, "It␣", NUMBER, continuation=" seventy.")
    assert (none.answer, none.dropped) == (None, "the continuation gives no answer")
    words = read_branch(text, "It␣", Phrase(), continuation=" I mean. Nothing")
    assert (words.answer, words.span) == ("i mean", (10, 16))
    cut = read_branch(replace(text, finished="length"), "It␣", NUMBER, continuation=" 71.")
    assert cut.dropped == "cut by the length limit", "the first reason is told"


def test_the_max_path_and_the_aggregated_answer_may_differ() -> None:
    result = Branches("", [branch("5", 0.3), branch(None, None), branch("7", 0.5), branch("5", 0.3)])
    assert result.counting == [0, 2, 3]
    assert result.max_path() == 2
    assert (result.answer(), result.answer(aggregate=True)) == ("7", "5")
    assert result.totals() == {"5": pytest.approx(0.6), "7": pytest.approx(0.5)}
    assert result.votes() == {"5": 2, "7": 1}
    assert result.first(3).answer(aggregate=True) == "7"
    assert (result.representative("5"), result.representative("7")) == (0, 2)


def test_log_probability_rankings_take_the_same_branches() -> None:
    long, short = branch("5", 0.9, -6.0, length=12), branch("7", 0.1, -2.0, length=1)
    result = Branches("", [short, long, long, long])
    assert [result.answer(ranking) for ranking in RANKINGS.values()] == ["5", "7", "5"]
    totals = result.totals(LOG_PROB)
    assert totals == {"7": pytest.approx(-2), "5": pytest.approx(math.log(3 * math.exp(-6)))}
    assert result.answer(LOG_PROB, aggregate=True) == "7"
    nearly = Branches("", [branch("7", 0.1, -6.5), long, long])
    assert nearly.answer(LOG_PROB, aggregate=True) == "5"
    deep = Branches("", [branch("7", 0.0, -2000.0), branch("5", 0.0, -2000.5), branch("5", 0.0, -2000.5)])
    assert deep.answer(LOG_PROB, aggregate=True) == "5", "probabilities too small for floats still add up"


def test_a_function_of_the_users_ranks_branches(tmp_path: Path) -> None:
    branches = [branch("5", 0.9, -3.0), branch("7", 0.2, -1.0), branch(None, None, -0.1), branch("5", 0.1, -4.0)]
    result = Branches("", branches)

    def unsure(branch: Branch) -> float:
        return 0.0 if branch.delta is None else 1 - branch.delta

    assert result.max_path(unsure) == 3
    assert result.totals(unsure) == {"5": pytest.approx(1.0), "7": pytest.approx(0.8)}
    assert (result.answer(unsure), result.answer(unsure, aggregate=True)) == ("5", "5")
    assert (result.representative("5"), result.representative("5", unsure)) == (0, 3)
    best = Ranking(unsure, "unsure", "1 - Δ", max)
    assert result.totals(best) == {"5": pytest.approx(0.9), "7": pytest.approx(0.8)}
    # The command line names it by its file; the built-in ones go through the same door.
    file = tmp_path / "mine.py"
    file.write_text("def unsure(branch):\n    return 1 - branch.delta\n\n\nword = 'x'\n")
    mine = make_ranking(f"{file}:unsure", "--ranking")
    assert (mine.name, result.answer(mine)) == ("unsure", "5")
    assert mine.needs == "confidence", "a function may read all that one pass gives"
    built_in = RANKINGS | MEASURED
    assert [make_ranking(name.replace("_", "-")) for name in built_in] == list(built_in.values())
    for name, message in (
        ("length", "--ranking = 'length': must be delta, log-prob, normalised-log-prob, mean-confidence, "),
        (f"{file}:word", "must be a function from a branch to a number"),
        (f"{file}:missing", "must be a function from a branch to a number"),
        (f"{file}x.py:unsure", "there is no file"),
    ):
        with pytest.raises(InputError) as error:
            make_ranking(name, "--ranking")
        assert message in str(error.value)
    for bad in (lambda branch: None, lambda branch: math.nan):
        with pytest.raises(InputError, match=r"must be a number for every branch with an answer"):
            result.answer(bad)


def test_of_equals_the_first_wins() -> None:
    result = Branches("", [branch("9", 0.0), branch("5", 0.5), branch("7", 0.5)])
    assert (result.max_path(), result.aggregated_answer(), result.majority_answer()) == (1, "5", "9")
    assert Branches("", [branch("7", 0.1), branch("5", 0.2), branch("7", 0.1)]).aggregated_answer() == "7"
    # In floats 0.1 + 0.2 > 0.3, but the sum here is rounded once only, whatever the order.
    shuffled = [branch("a", d) for d in (0.1, 0.2, 0.3)] + [branch("b", d) for d in (0.3, 0.2, 0.1)]
    assert Branches("", shuffled).aggregated_answer() == "a"
    assert Branches("", shuffled[::-1]).aggregated_answer() == "b"


def test_without_any_candidate_there_is_no_answer() -> None:
    result = Branches("", [branch(None, None)] * 3)
    assert (result.max_path(), result.answer(), result.answer(aggregate=True)) == (None, None, None)
    assert (result.majority_answer(), result.votes(), result.totals()) == (None, {}, {})


def test_bad_arguments() -> None:
    result = Branches("", [branch("5", 0.5)])
    with pytest.raises(InputError, match=r"^ranking = 'length': must be a Ranking, or a function"):
        result.answer("length")  # type: ignore[arg-type]
    for count in (0, 2):
        with pytest.raises(InputError, match=rf"^branches = {count}: must lie in \[1, 1\]"):
            result.first(count)

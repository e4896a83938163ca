"""Pairs of right and wrong branches counted by hand; a question whose branches are all right or all wrong has none."""

from __future__ import annotations

from typing import Any

import pytest

from mod_star.evaluation.discrimination import any_right, discrimination, early_stop_gain


def branch(answer: str | None, delta: float, log_prob: float, **more: Any) -> dict[str, Any]:
    return {
        "first_token": "", "answer": answer, "delta": delta, "log_prob": log_prob, "normalised_log_prob": log_prob / 2,
        "dropped": None if answer else "no answer in it", "finished": "end", "tokens": 2, "span": None,
        "continuation": None, "text": "", **more,
    }  # fmt: skip


def record(number: int, *branches: dict[str, Any]) -> dict[str, Any]:
    return {"id": str(number), "gold": "5", "branches": list(branches)}


RECORDS = [
    # Δ: 0.9 over 0.5 and 0.9, 0.2 under both: 1 + ½ of 4. log p: both under -1, over -4: 2 of 4.
    record(
        0, branch("5", 0.9, -2), branch("5", 0.2, -3), branch("6", 0.5, -1), branch("7", 0.9, -4), branch(None, 2, 0)
    ),
    record(1, branch("5", 0.7, -2), branch("6", 0.1, -1)),  # Δ 1 of 1, log p none
    record(2, branch("6", 0.7, -2), branch("7", 0.1, -1)),
    record(3, branch("5", 0.7, -2), branch("5", 0.1, -1)),
    record(4, branch(None, 0.7, -2), branch("6", 0.1, -1, dropped="empty")),
]


def test_pairs_of_one_question_are_compared_and_questions_resampled() -> None:
    found = discrimination(RECORDS)
    assert list(found) == ["Δ", "log-prob", "log-prob per token"]
    assert found["Δ"].value == pytest.approx((1.5 + 1) / 5)
    assert found["log-prob"].value == found["log-prob per token"].value == pytest.approx(2 / 5)
    assert {each.n for each in found.values()} == {2}
    # Two questions: one of them twice, each once, the other twice.
    assert found["Δ"].low == pytest.approx(1.5 / 4) and found["Δ"].high == 1
    assert discrimination(RECORDS[::-1]) == found, "whatever the order in which they were done"
    assert discrimination(RECORDS[2:]) == {} == discrimination([{"id": "x", "gold": "5"}])


def test_only_what_every_branch_has_is_compared() -> None:
    measured = {"mean": 2.0, "lowest_group": 1.0, "bottom_groups": 1.0, "tail": 3.0, "self_certainty": 4.0}
    sure, unsure = {"confidence": measured, "p_true": 0.75}, {"confidence": measured | {"tail": 2.5}, "p_true": 0.8}
    both = [record(0, branch("5", 0.5, -1, **sure), branch("6", 0.5, -1, **unsure))]
    found = {name: each.value for name, each in discrimination(both).items()}
    assert found.pop("tail") == 1 and found.pop("P(True)") == 0
    assert set(found.values()) == {0.5} and len(found) == 7, "ties are halves"
    assert len(discrimination([*both, RECORDS[1]])) == 3


def test_what_stopping_early_saves_and_costs() -> None:
    whole, early = "self-consistency", "self-consistency, stopped early"
    made = [
        {"id": str(n), "tokens": tokens, "tokens_early": less, "scores": {whole: right, early: still}}
        for n, (tokens, less, right, still) in enumerate(
            [
                (100, 40, True, True),
                (10, 10, True, False),
                (50, 30, False, True),
                (40, 20, True, False),
                (0, 0, False, False),
            ]
        )
    ]
    found = early_stop_gain(made)
    assert found["tokens saved"].value == pytest.approx((60 + 0 + 20 + 20) / 200)
    assert found["accuracy gained"].value == pytest.approx((0 - 1 + 1 - 1) / 4)
    assert 0 <= found["tokens saved"].low < 0.5 < found["tokens saved"].high <= 0.6
    assert early_stop_gain(made[4:]) == {} == early_stop_gain(RECORDS)


def test_any_branch_right_is_what_no_choice_exceeds() -> None:
    found = any_right(RECORDS)
    assert found is not None and (found.value, found.n) == (3 / 5, 5)
    dropped = [record(0, branch("5", 0.5, -1, dropped="cut by the length limit"), branch("6", 0.5, -1))]
    none = any_right(dropped)
    assert none is not None and none.value == 0
    assert any_right([record(0, branch("5", 0.5, -1))]) is None, "greedy decoding chooses nothing"
    assert any_right([{"id": "x", "gold": "5"}]) is None

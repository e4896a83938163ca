"""The lines of the CoT-decoding experiment are right, held-out questions stay out, and accuracies are counted right."""

from __future__ import annotations

import re

import numpy as np
import pytest

from experiments.cot_decoding_composition.run import BRANCHES, accuracies, openings
from experiments.support.composition_task import PERMUTATIONS
from experiments.support.worked_lines import (
    HELD_OUT,
    LENGTH,
    OPENINGS,
    QUESTIONS,
    SYMBOLS,
    TAUGHT,
    TOKENIZER,
    make_batch,
    make_line,
    question,
)
from mod_star.decoding import Completion
from mod_star.decoding.branches import Branch, Branches


def states_of(line: str) -> list[int]:
    states = [int(line[1])]
    for operation in line[2:8]:
        states.append(int(PERMUTATIONS["abcd".index(operation)][states[-1]]))
    return states


def test_lines_are_right_and_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    lines = [make_line(rng) for _ in range(2000)]
    held_out = {question(int(number)).text for number in HELD_OUT}
    for line in lines:
        states = states_of(line)
        assert line[:9] not in held_out
        shown = {"(": states[1:-1], "[": states[:1] * 5}.get(line[9], [])
        working = "".join(f"{state}[,;-]" for state in shown) + {"(": r"\)", "[": r"\]"}.get(line[9], "")
        assert re.fullmatch(rf"Q\d[abcd]{{6}}=[#(!\[]{working}{states[-1]}\n", line)
    for opening, share in OPENINGS.items():
        assert np.mean([line[9] == opening for line in lines]) == pytest.approx(share, abs=0.05)


def test_questions_are_distinct_and_split() -> None:
    assert len({question(number).text for number in range(0, QUESTIONS, 7)}) == len(range(0, QUESTIONS, 7))
    assert not set(HELD_OUT) & set(TAUGHT) and len(HELD_OUT) + len(TAUGHT) == QUESTIONS
    for number in (0, 17, QUESTIONS - 1):
        asked = question(number)
        assert list(asked.states) == states_of(asked.text) and asked.answer == str(asked.states[-1])


def test_a_batch_is_lines_set_end_to_end() -> None:
    batch = make_batch(np.random.default_rng(1), 3)
    tokens, targets = np.asarray(batch["tokens"]), np.asarray(batch["targets"])
    assert tokens.shape == targets.shape == (3, LENGTH)
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    assert (tokens[:, 0] == TOKENIZER.bos_id).all()
    for row in tokens:
        first, *_, unfinished = "".join(SYMBOLS[token] for token in row[1:]).splitlines()
        assert first[9] in OPENINGS and first[-1] == str(states_of(first)[-1])
        assert unfinished.startswith("Q")


def branch(token: str, answer: str | None, delta: float | None) -> Branch:
    made = Completion("", token, [0], [-1.0], "end", [], 0)
    return Branch(made, token, None, answer, delta, -1.0, -1.0, None if answer else "no answer in it")


def test_accuracies_count_by_branches() -> None:
    asked = [question(5), question(6)]
    right, wrong = asked[0].answer, str((int(asked[0].answer) + 1) % 5)
    first = [branch("#", wrong, 0.1), branch("(", right, 0.9), *[branch("!", wrong, 0.19)] * 8]
    second = [branch("#", asked[1].answer, 0.1), branch("(", None, None), *[branch("!", None, None)] * 8]
    results = [Branches("", first), Branches("", second)]
    found = accuracies(asked, results, {0.7: results, 1.0: results})
    assert found["greedy"] == [0.5]
    assert found["delta max"] == [0.5] + [1.0] * (BRANCHES - 1)
    assert found["delta aggregated"] == [0.5, *[1.0] * 5, *[0.5] * 4], "from k = 7 on, their sum is larger"
    assert found["majority of branches"] == found["self-consistency 1"] == [0.5] * BRANCHES
    assert found["any branch"] == [0.5] + [1.0] * (BRANCHES - 1)
    assert found["sampling 0.7"] == [pytest.approx(0.1)]
    table = openings(asked, results)
    assert table["("] == {
        "branches": 1.0, "dropped": 0.5, "right": 1.0, "delta": 0.9, "log_prob": -1.0, "normalised_log_prob": -1.0,
    }  # fmt: skip
    assert table["!"]["branches"] == 8.0 and table["!"]["right"] == 0.0

"""The task of `experiments.quiet_star_length`, and its report on results made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.quiet_star_length.report import report
from experiments.quiet_star_length.task import LENGTH, SYMBOLS, make_batch, make_line, steps_of
from experiments.support.composition_task import PERMUTATIONS


def spelled(symbols: list[int]) -> str:
    return "".join(SYMBOLS[symbol] for symbol in symbols)


def test_lines_say_what_the_operations_make_of_the_start() -> None:
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(300):
        line = spelled(make_line(rng, brackets=0.7, truthful=0.5))
        question, answer = line.split("=")
        start, places = question[1], question[2:]
        assert question[0] == "Q" and len(places) == 8 and places.rstrip(".").isalpha()
        states = [start]
        for place in places:
            states.append(states[-1] if place == "." else str(PERMUTATIONS["abcd".index(place)][int(states[-1])]))
        assert answer[-1] == states[-1]
        if "(" in answer:
            shown = answer[1:-2]
            lengths.add(len(shown))
            true = "".join([*states[1:], *[states[-1]] * 4])
            assert shown in (true[: len(shown)], start * len(shown))
    assert lengths == set(range(1, 13))


def test_answers_are_found_with_their_steps_of_work() -> None:
    batch = make_batch(np.random.default_rng(1), 4, brackets=0.0)
    steps, tokens = steps_of(batch), np.asarray(batch["tokens"])
    assert tokens.shape == (4, LENGTH) and (steps > 0).sum(1).tolist() == [5] * 4
    for row, index in zip(*np.nonzero(steps), strict=True):
        question = spelled(tokens[row, index - 10 : index + 1].tolist())
        assert question[0] == "Q" and question[-1] == "="
        assert len(question.rstrip("=.")) == 2 + steps[row, index]
    assert steps_of(make_batch(np.random.default_rng(1), 4, brackets=1.0)).max() == 0


def test_report(tmp_path: Path) -> None:
    for length, right in ((2, 0.5), (8, 1.0)):
        for seed in range(3):
            accuracy = {"without": [0.25] * 8, "with": [right - 0.1 * seed] * 8}
            result = {"arm": f"length {length}", "seed": seed, "after": accuracy, "flops_per_step": 2e9, "seconds": 1.0}
            (tmp_path / f"length_{length}-{seed}.json").write_text(json.dumps(result))
    console = Console(width=200, record=True)
    report(tmp_path, ("no thoughts", "length 2", "length 8"), console)
    table = (tmp_path / "results.md").read_text()
    assert "| length 8 | 90 ± 10 |" in table and "| length 2 | 40 ± 10 |" in table
    assert (tmp_path / "figure.png").stat().st_size > 10_000

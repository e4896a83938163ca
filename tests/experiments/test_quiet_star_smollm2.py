"""The report of the experiment, from records like those that an evaluation leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from experiments.quiet_star_smollm2.report import differences, report

ARMS = {"before": 0.2, "trained on": 0.1, "quiet-star, thinking": 0.3}


def write(path: Path, items: int, expected: float, ids: range | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": str(i), "scores": {"expected probability": expected, "argmax": i % 4 == 0, "greedy": False}})
        for i in (ids or reversed(range(items)))
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_tables_hold_intervals_and_paired_differences_of_complete_evaluations(tmp_path: Path) -> None:
    files = {
        name: {task: write(tmp_path / f"{name}-{task}.jsonl", 40, value) for task in ("gsm8k", "csqa")}
        for name, value in ARMS.items()
    }
    write(files["quiet-star, thinking"]["csqa"], 39, 0.9)  # is still being evaluated
    files["quiet-star"] = {"gsm8k": tmp_path / "not begun.jsonl", "csqa": tmp_path / "nor this.jsonl"}
    report(tmp_path, files, Console(quiet=True))
    text = (tmp_path / "results.md").read_text()
    gsm8k, csqa = text.split("| CommonsenseQA, 40 questions |")
    assert "| quiet-star, thinking | 30.0 % (30.0 to 30.0) | 25.0 % (14.2 to 40.2) | 0.0 % (0.0 to 8.8) |" in gsm8k
    assert "| trained on less before | -10.0 (-10.0 to -10.0) | +0.0 (+0.0 to +0.0) |" in gsm8k
    assert "| quiet-star, thinking less trained on | +20.0 (+20.0 to +20.0) |" in gsm8k
    assert "thinking" not in csqa and "| trained on | 10.0 % (10.0 to 10.0) |" in csqa
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_other_questions_are_no_pairs() -> None:
    one, other = ([{"id": number, "scores": {"argmax": True}}] for number in "12")
    with pytest.raises(ValueError, match="different questions"):
        differences(one, other, "argmax")

"""The report of `experiments.cot_decoding_smollm2` on records made by hand, and the order in which it asks."""

from __future__ import annotations

import json
import lzma
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.cot_decoding_smollm2.report import REPORT
from experiments.cot_decoding_smollm2.run import STUDY, Options
from experiments.support.path_report import cell, cot, read, report
from experiments.support.paths import turns
from experiments.support.tables import read_cell, read_tables
from mod_star.evaluation.intervals import accuracy
from mod_star.evaluation.records import RECORDS_FILE

FOLDER = Path(__file__).parents[2] / "experiments/cot_decoding_smollm2"


def row(answer: str | None, delta: float, log_prob: float, dropped: str | None = None) -> dict[str, Any]:
    return {
        "first_token": "A", "answer": answer, "delta": delta, "log_prob": log_prob,
        "normalised_log_prob": log_prob / 10, "dropped": dropped, "finished": "length" if dropped else "end",
        "tokens": 10, "span": [0, 1], "continuation": None, "text": answer,
    }  # fmt: skip


def test_marks_and_report(tmp_path: Path) -> None:
    # Greedy says 1, the surest branch 2, most branches by Δ 3, the most probable 4; the gold answer takes turns.
    branches = [row("1", 0.1, -9.0), row("2", 0.9, -8.0), row("3", 0.6, -7.0), row("3", 0.5, -6.0)]
    branches += [row("4", 0.05, -1.0), *[row("5", 1.0, -0.5, "cut by the length limit")] * 5]
    samples = [row("6", 0.5, -5.0, "cut by the length limit"), *[row("7", 0.5, -5.0)] * 5, *[row("8", 0.5, -1.0)] * 4]
    right = {
        "1": ("greedy", cot(1, "Δ", False), cot(1, "log-prob", True)),
        "2": (cot(10, "Δ", False), cot(2, "Δ", True), cot(5, "Δ", False)),
        "3": (cot(10, "Δ", True), cot(5, "log-prob per token", True)),
        "4": (cot(10, "log-prob", False), cot(5, "log-prob per token", False)),
        "5": ("any of 10 branches, dropped ones too",),
        "6": ("temperature 0.7", "any of 10 samples, dropped ones too"),
        "7": ("self-consistency, 10",),
    }
    lines = [
        {"id": f"gsm8k/plain/{gold}", "task": "gsm8k", "prompt": "plain", "gold": gold, "question": "?",
         "branches": branches, "samples": samples, "seconds": 2.0}
        for gold in right
    ]  # fmt: skip
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"id": "half')
    marks, records = read(tmp_path, REPORT)
    assert len(records) == 7
    for index, (gold, names) in enumerate(right.items()):
        for name in names:
            assert marks["gsm8k", "plain"][name][index] == 1.0, (gold, name)
    assert sum(marks["gsm8k", "plain"][cot(10, "Δ", True)]) == 1.0
    assert marks["gsm8k", "plain"]["any of 10 branches"] == [1.0] * 4 + [0.0] * 3
    assert marks["gsm8k", "plain"]["any of 10 samples"] == [0.0] * 6 + [1.0]

    console = Console(width=200, record=True)
    report(tmp_path, console, REPORT)
    tables = (tmp_path / "results.md").read_text()
    assert "| greedy | 14.3 (2.6 to 51.3) |" in tables, "one of seven, Wilson's interval"
    assert "| GSM8K, plain, branches | 10 | 50.0 % | 50.0 % | 2.0 |" in tables
    assert json.loads((tmp_path / "results.json").read_text())["gsm8k, plain"]["greedy"]["n"] == 7
    assert (tmp_path / "cot_decoding_smollm2.png").stat().st_size > 10_000
    empty = tmp_path / "empty"
    report(empty, console, REPORT)
    assert "nothing to report yet" in console.export_text() and not empty.exists()


def test_tasks_and_prompts_take_turns(tmp_path: Path) -> None:
    for part in STUDY.parts:
        question, answer = ("sQuestion", "lSolutions") if part.task == "multiarith" else ("question", "answer")
        gold: Any = {"multiarith": [3.0], "gsm8k": "#### 3", "coin_flip": "yes"}[part.task]
        made = [{question: f"{n}?", answer: gold, "iIndex": n} for n in range(part.items + 20)]
        (tmp_path / part.file).write_text(
            "\n".join(map(json.dumps, made)) if part.file.endswith("l") else json.dumps(made)
        )
    every = list(turns(STUDY, Options(data=tmp_path)))
    asked = [(turn.part.task, turn.wording, item.id) for turn in every for item in turn.items]
    assert len(asked) == len(set(asked)) == 1000
    assert Counter(asked[i][:2] for i in range(1000)) == {
        (part.task, prompt): part.items for part in STUDY.parts for prompt in ("plain", "step by step")
    }
    early = Counter(task for task, _, _ in asked[:500])
    for part in STUDY.parts:
        assert abs(early[part.task] - part.items) <= 16, "half of the questions at half time"
    few = [
        (turn.part.task, turn.wording, item.id)
        for turn in turns(STUDY, Options(data=tmp_path, limit=8))
        for item in turn.items
    ]
    assert sorted(few) == sorted(asked[:48])
    assert [prompt for _, prompt, _ in few] == ["plain"] * 24 + ["step by step"] * 24


def test_the_stored_records_give_the_table_of_the_readme(tmp_path: Path) -> None:
    with lzma.open(FOLDER / "records/records.jsonl.xz") as packed, (tmp_path / RECORDS_FILE).open("wb") as file:
        shutil.copyfileobj(packed, file)
    marks, records = read(tmp_path, REPORT)
    assert len(records) == 1000
    table = read_tables((FOLDER / "README.md").read_text(encoding="utf-8"))[0]
    columns = {"": "plain", ", step by step": "step by step"}
    for row, cells in table.items():
        assert cells == {
            f"{title}{ending}": read_cell(cell(accuracy([mark > 0 for mark in marks[task, prompt][row]])))
            for ending, prompt in columns.items()
            for task, title in REPORT.tasks.items()
        }, row
    assert len(table) >= 18

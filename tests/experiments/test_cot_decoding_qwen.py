"""The report of `experiments.cot_decoding_qwen` on small records made by hand, and how questions are asked and kept."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.cot_decoding_qwen import year_parity
from experiments.cot_decoding_qwen.report import REPORT
from experiments.cot_decoding_qwen.run import STUDY, Options
from experiments.support.path_report import cell, cot, filtered, methods, overview, read, report, weighed
from experiments.support.paths import Turn, ask_missing, turns
from experiments.support.small_records import ROW, small, whole
from experiments.support.tables import read_cell, read_tables
from mod_star.errors import InputError
from mod_star.evaluation.branch_records import branches_of
from mod_star.evaluation.intervals import accuracy
from mod_star.evaluation.records import Record, open_records

FOLDER = Path(__file__).parents[2] / "experiments/cot_decoding_qwen"
CONSOLE = Console(width=300, record=True)


def row(answer: str | None, delta: float, confidence: float, dropped: str | None = None) -> dict[str, Any]:
    names = ("mean", "lowest_group", "bottom_groups", "tail", "self_certainty")
    return {
        "confidence": dict.fromkeys(names, confidence), "first_token": "A", "answer": answer, "delta": delta,
        "log_prob": -9.0, "normalised_log_prob": -0.9, "dropped": dropped, "finished": "length" if dropped else "end",
        "tokens": 10, "span": [0, 1], "continuation": None, "text": f"The answer is {answer}.",
    }  # fmt: skip


def record(name: str, task: str, prompt: str, gold: str, greedy: str = "1") -> Record:
    """Greedy decoding says `greedy`, the surest branch by Δ 2, by confidence 3; most samples 4, the surest ones 5."""
    branches = [row(greedy, 0.1, 1.0), row("2", 0.9, 2.0), row("3", 0.5, 9.0), *[row("6", 1.0, 9.0, "cut")] * 7]
    samples = [*[row("4", 0.5, 1.0)] * 6, *[row("5", 0.5, 7.0)] * 4]
    return {
        "id": name, "task": task, "prompt": prompt, "gold": gold, "question": "How many?", "branches": branches,
        "samples": samples, "seconds": 2.0,
    }  # fmt: skip


def test_small_records_answer_as_whole_ones() -> None:
    made = record("a", "gsm8k", "chat", "2")
    kept = small(made, keep_texts=True)
    assert kept["texts"] == {
        "question": "How many?", "greedy": "The answer is 1.", "CoT-decoding": "The answer is 2.",
    }  # fmt: skip
    assert "texts" not in small(made, keep_texts=False)
    assert "texts" not in small(record("a", "gsm8k", "chat", "2", greedy="2"), keep_texts=True), "both say 2"
    back = whole(json.loads(json.dumps(kept)))
    assert whole(made) == made
    assert [len(each) for each in kept["branches"]] == [len(ROW)] * 10
    for name, method in methods(REPORT).items():
        answers = [method(branches_of(each["branches"]), branches_of(each["samples"])) for each in (made, back)]
        assert answers[0] == answers[1], name
    assert cot(10, "mean confidence", True) in methods(REPORT)


def test_report_on_small_records(tmp_path: Path) -> None:
    golds = {"1": "greedy", "2": cot(10, "Δ", False), "3": cot(10, "tail", True), "4": "self-consistency, 10"}
    golds["5"] = weighed("lowest group", 0.1)
    made = [record(f"{task}{gold}", task, "chat", gold) for task in ("gsm8k", "coin_flip") for gold in golds]
    lines = [json.dumps(small(each, keep_texts=each["gold"] == "2")) for each in made]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    marks, _ = read(tmp_path, REPORT)
    for number, (gold, name) in enumerate(golds.items()):
        assert marks["gsm8k", "chat"][name] == [float(number == other) for other in range(5)], (gold, name)
    assert marks["coin_flip", "chat"][filtered("mean confidence")] == marks["gsm8k", "chat"][golds["5"]]
    together = REPORT.columns(marks, "chat")
    assert list(together) == ["all tasks", "GSM8K", "coin flip"]
    assert together["all tasks"]["greedy"] == [1.0, 0.0, 0.0, 0.0, 0.0] * 2
    report(tmp_path, CONSOLE, REPORT, tmp_path / "tables")
    tables = (tmp_path / "tables/results.md").read_text()
    assert "|  | all tasks (n = 10) | GSM8K (n = 5) | coin flip (n = 5) |" in tables
    assert "| greedy | 20.0 (5.7 to 51.0) |" in tables, "two of ten, Wilson's interval"
    assert "| CoT aggregated, Δ, k = 10 less self-consistency, 10 | 0.0 (" in tables
    head, rows = overview(marks, REPORT)
    assert head == ["", "chat (n = 10)"] and rows[0] == ["greedy", "20.0 (5.7 to 51.0)"]
    assert "| CoT max, self-certainty, k = 10 | 20.0 (5.7 to 51.0) |" in tables
    texts = (tmp_path / "tables/texts.md").read_text()
    assert texts.count("## ") == 2, "one of each task"
    assert "## gsm8k2: right 2, greedy 1, CoT 2 (branch 1, Δ 0.900)" in texts
    assert (tmp_path / "tables/cot_decoding_qwen.png").stat().st_size > 10_000


def test_asking_ends_in_time_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    year_parity.write_questions(tmp_path)
    for name, question, answer in (
        ("multiarith.json", "sQuestion", "lSolutions"),
        ("coin_flip.json", "question", "answer"),
    ):
        gold: Any = [3] if answer == "lSolutions" else "yes"
        (tmp_path / name).write_text(json.dumps([{question: f"{n}?", answer: gold, "iIndex": n} for n in range(4)]))
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps({"question": "?", "answer": "#### 3"}))
    todo = list(turns(STUDY, Options(data=tmp_path, limit=1)))
    assert len(todo) == 16, "a question of each task under each prompt"

    def answered(turn: Turn) -> list[Record]:
        return [record(turn.id_of(item), turn.part.task, turn.wording, item.gold) for item in turn.items]

    out = tmp_path / "records"
    with open_records(out, {}) as records:
        assert not ask_missing(todo, records, answered, 3, CONSOLE, time.monotonic() - 1)
        assert not records.by_id
        assert ask_missing(todo[:5], records, answered, 3, CONSOLE, None)
    first = (out / "records.jsonl").read_text()
    with open_records(out, {}) as records:
        assert ask_missing(todo, records, answered, 3, CONSOLE, time.monotonic() + 1000)
        assert len(records.by_id) == 16
        assert sum("texts" in each for each in records.by_id.values()) == 3
        assert ": 16 of 16\n" in capsys.readouterr().out
    # What is counted is what this command asks, whatever else has been asked before.
    with open_records(out, {}) as records:
        other = list(turns(STUDY, Options(data=tmp_path, limit=2, only=("coin_flip, chat",))))
        assert ask_missing(other, records, answered, 3, CONSOLE, None)
    assert " coin_flip, chat: 2 of 2\n" in capsys.readouterr().out
    assert (out / "records.jsonl").read_text().startswith(first)


def test_year_parity(tmp_path: Path) -> None:
    year_parity.write_questions(tmp_path)
    (part,) = (part for part in STUDY.parts if part.task == "year_parity")
    items = part.load(tmp_path).items
    assert len(items) == part.items == len(year_parity.BORN)
    golds = {item.question: item.gold for item in items}
    assert golds["Was Albert Einstein born in an even or odd year?"] == "odd"
    assert golds["Was Nicolas Cage born in an even or odd year?"] == "even"
    with pytest.raises(InputError, match="must be one of"):
        list(turns(STUDY, Options(data=tmp_path, only=("year parity",))))


def test_the_stored_records_give_the_tables_of_the_readme() -> None:
    """One for each prompt that was asked, with as many questions of each task."""
    marks, records = read(FOLDER / "records", REPORT)
    prompts = [prompt for prompt in STUDY.wordings if any(prompt == other for _, other in marks)]
    tables = [each for each in read_tables((FOLDER / "README.md").read_text(encoding="utf-8")) if "greedy" in each]
    for prompt, table in zip(prompts, tables, strict=True):
        parts = {f"{title} (n = {len(part['greedy'])})": part for title, part in REPORT.columns(marks, prompt).items()}
        assert len({len(part["greedy"]) for title, part in parts.items() if "all" not in title}) == 1
        assert len(table) >= 10
        for name, cells in table.items():
            assert cells == {
                title: read_cell(cell(accuracy([mark > 0 for mark in part[name]]))) for title, part in parts.items()
            }, name
    assert len({each["id"] for each in records}) == len(records) > 0
    assert sum("texts" in each for each in records) <= 20

"""What a terminal shows of branches: rows, marks, what won and why others were dropped; and the same as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from mod_star.decoding import Completion
from mod_star.decoding.answers import LastNumber
from mod_star.decoding.branches import Branches, read_branch
from mod_star.decoding.early_stop import DECIDED, UNSURE
from mod_star.decoding.rankings import DELTA, LOG_PROB
from mod_star.views.branches import SPAN, beam_record, beams_table, branches_record, branches_table, excerpt, outcome

LONG = "First, " + "there are many words before it. " * 12 + "So 5 + 2 = 7 in all" + ", and many after it" * 12 + "."


def completion(text: str, finished: Any = "end", gap: float = 0.5) -> Completion:
    return Completion(
        prompt="Q", text=text, tokens=list(range(len(text))), log_probs=[-0.1] * len(text), finished=finished,
        routed_fraction=[], overflow=0, gaps=[gap] * len(text), starts=list(range(len(text))),
        end_log_prob=-0.1 if finished == "end" else None, end_gap=0.9 if finished == "end" else None,
    )  # fmt: skip


def branches() -> Branches:
    texts = (
        completion("It is 5.", gap=0.25),
        completion(LONG, gap=0.75),
        completion("Is it\x1b[31m 9?"),
        completion("5\nin all", gap=0.625),
        completion("and on", "length"),
    )
    return Branches("Q", [read_branch(each, f"t{i}", LastNumber()) for i, each in enumerate(texts)])


def printed(*shown: Any, width: int = 80, color: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=color, color_system="standard" if color else None)
    for each in shown:
        console.print(each)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_says_who_won_and_fits(width: int) -> None:
    table = printed(branches_table(branches(), DELTA, width=width), width=width)
    lines = table.splitlines()
    assert max(map(len, lines)) <= width
    words = [line.split() for line in lines]
    assert words[0] == ["first", "answer", "Δ", "won", "text"]
    assert ["0", "t0", "5", "0.250", "Σ", "It", "is", "5."] in words
    assert ["3", "t3", "5", "0.625", "Σ", "5↵in", "all"] in words
    (row,) = [each for each in words if each[:2] == ["1", "t1"]]
    assert row[2:6] == ["7", "0.750", "max", "First,"]
    (row,) = [each for each in words if each[:2] == ["2", "t2"]]
    assert row[2:8] == ["9", "0.500", "ends", "in", "a", "question"]
    (row,) = [each for each in words if each[:2] == ["4", "t4"]]
    assert row[2:8] == ["–", "–", "cut", "by", "the", "length"]
    assert "\x1b" not in table, "control characters of a text are made visible"
    assert "So 5 + 2 = 7" in " ".join(table.split()), "a long text is cut, what is around its answer stays"
    assert len(lines) < 22
    assert [line.split(maxsplit=2) for line in lines[-4:]] == [
        ["max", "path", "7  branch 1, Δ 0.750"],
        ["aggregated", "5", "ΣΔ 0.875 of 2 branches"],
        ["others", "7", "0.750"],
        ["dropped", "2", "of 5 branches"],
    ]


def test_the_answer_is_marked_in_the_text_and_dropped_branches_are_dim() -> None:
    table = printed(branches_table(branches(), DELTA, width=100), width=100, color=True)
    assert "It is \x1b[1;7m5\x1b[0m." in table
    assert "= \x1b[1;7m7\x1b[0m in all" in table
    assert "\x1b[2;3mcut by the length limit: \x1b[0m\x1b[2mand on" in table
    assert table.count("\x1b[1;32mΣ") == 2 and table.count("\x1b[1;32mmax") == 1


def test_other_rankings_and_samples() -> None:
    table = printed(branches_table(branches(), LOG_PROB))
    assert table.split()[:5] == ["first", "answer", "log", "p", "won"]
    assert "max path   5  branch 0, log p -0.900" in table
    assert "aggregated 5  log Σ exp(log p) " in table
    table = printed(branches_table(branches(), DELTA, samples=True))
    assert "majority   5  2 of 3 votes" in table
    assert ["0", "t0", "5", "0.250", "vote", "It", "is", "5."] in [line.split() for line in table.splitlines()]
    assert "Σ" not in table and "max" not in table
    none = Branches("Q", branches().branches[4:])
    assert "no answer: all 1 branches were dropped" in printed(branches_table(none, DELTA))
    assert [line.plain for line in outcome(none, DELTA, samples=True)] == ["no answer: all 1 samples were dropped"]


def test_samples_that_stopped_early_are_counted() -> None:
    whole = [read_branch(completion(text), "", LastNumber()) for text in ("It is 5.", "It's 5..", "5.......")]
    early = [
        replace(read_branch(completion(text, None), "", LastNumber()), dropped=why)
        for text, why in (("It is", UNSURE), ("I", DECIDED))
    ]
    lines = [line.plain for line in outcome(Branches("Q", [*whole, *early]), DELTA, samples=True)]
    # Of 5 samples of 8 tokens 40 would have been generated; it were 24 + 6.
    assert (
        lines[-2] == "stopped    2 of 5 samples, after 6 tokens together: 25% saved if they were as long as the others"
    )
    assert lines[-1] == "dropped    2 of 5 samples"
    (none, saving) = [line.plain for line in outcome(Branches("Q", early), DELTA, samples=True)]
    assert none.startswith("no answer") and saving == "stopped    2 of 2 samples, after 6 tokens together"
    table = printed(branches_table(Branches("Q", [*whole, *early]), DELTA, samples=True, width=120), width=120)
    assert "stopped: the vote was decided: I" in table


def test_excerpts() -> None:
    assert excerpt("short 5", (6, 7), 40).markup == "short [bold reverse]5[/bold reverse]"
    start = LONG.index("7 in")
    for room in (40, 60, 100, 200):
        shown = excerpt(LONG, (start, start + 1), room)
        assert len(shown.plain) <= room + 10
        assert " … " in shown.plain and shown.plain.startswith("First,") and shown.plain.endswith(" …")
        (mark,) = [span for span in shown.spans if span.style == SPAN]
        assert shown.plain[mark.start : mark.end] == "7" and shown.plain[mark.end :].startswith(" in")
    assert excerpt(LONG, None, 30).plain == LONG[:30] + " …"
    assert "9" * 300 in excerpt("It is " + "9" * 300, (6, 306), 40).plain, "an answer is never cut"


def test_records_are_json_without_nan() -> None:
    record = json.loads(json.dumps(branches_record(branches(), DELTA, False), allow_nan=False))
    assert record.keys() == {
        "prompt", "ranking", "max_path", "max_answer", "aggregated_answer", "totals", "branches",
    }  # fmt: skip
    assert (record["max_path"], record["max_answer"], record["aggregated_answer"]) == (1, "7", "5")
    assert record["totals"] == {"5": 0.875, "7": 0.75}
    first, *_, last = record["branches"]
    assert (first["answer"], first["span"], first["delta"], first["dropped"]) == ("5", [6, 7], 0.25, None)
    assert first["log_prob"] == pytest.approx(-0.9) and first["gaps"] == [0.25] * 8
    assert (last["delta"], last["span"], last["dropped"]) == (None, None, "cut by the length limit")
    votes = json.loads(json.dumps(branches_record(branches(), DELTA, True), allow_nan=False))
    assert (votes["majority"], votes["votes"]) == ("5", {"5": 2, "7": 1})
    assert json.loads(json.dumps(beam_record(completion("x", "length")), allow_nan=False))["end_gap"] is None


def test_beams() -> None:
    table = printed(beams_table([completion("It is 5."), completion(LONG, "length")], width=80))
    words = [line.split() for line in table.splitlines()]
    assert ["0", "-0.900", "-0.100", "8", "It", "is", "5."] in words
    assert "(cut by the length limit)" in " ".join(table.split())
    assert max(map(len, table.splitlines())) <= 80

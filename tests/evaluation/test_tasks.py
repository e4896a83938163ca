"""Task files: what items they give, and every way in which a file can be wrong, in one line."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mod_star.decoding.answers import HarnessNumber
from mod_star.errors import InputError
from mod_star.evaluation.tasks import CustomTask, Item, load_task

GSM8K = {"question": "Tom has 1 apple. ", "answer": "He gets 1,449 = <<1+1449=1450>>1450.\nDone.\n#### 1,450"}
CSQA = {
    "answerKey": "B",
    "id": "x7",
    "question": {"stem": "Where?", "choices": [{"label": "A", "text": "bank"}, {"label": "B", "text": "mall"}]},
}
MULTIARITH = {"iIndex": 3, "lSolutions": [39.0], "sQuestion": " How many? ", "lEquations": ["X=1"]}
COIN = {"question": "Is it still heads up?", "answer": "Yes"}


def written(path: Path, *records: Any) -> Path:
    """A .jsonl or .json file of these records; strings are written as they are."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return path


def test_the_published_forms(tmp_path: Path) -> None:
    (item,) = load_task("gsm8k", written(tmp_path / "a.jsonl", GSM8K)).items
    assert item == Item(
        "1", "Tom has 1 apple.", "1450", "number", solution="He gets 1,449 = 1450.\nDone.\nThe answer is 1450.",
        gold_text="1,450", published=GSM8K["answer"],
    )  # fmt: skip
    assert item.gold_by(None) == item.gold_by(HarnessNumber("strict")) == "1450"
    assert replace(item, gold_text="18.00").gold_by(HarnessNumber("flexible")) == "18.00", "as the harness compares"
    (item,) = load_task("csqa", written(tmp_path / "b.jsonl", CSQA)).items
    assert item == Item("x7", "Where?\n(A) bank\n(B) mall", "B", "choice", ("A", "B"), ("bank", "mall"), "B")
    (item,) = load_task("multiarith", written(tmp_path / "c.json", MULTIARITH)).items
    assert item == Item("3", "How many?", "39", "number", solution="39")
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"examples": [COIN, COIN | {"answer": "no"}]}))
    first, second = load_task("coin_flip", path).items
    assert (first.id, first.gold, second.id, second.gold) == ("1", "yes", "2", "no")
    assert first.choices == ("yes", "no")


def test_the_forms_of_the_datasets_library(tmp_path: Path) -> None:
    record = {
        "id": "x7", "question": "Where?", "question_concept": "place", "answerKey": "B",
        "choices": {"label": ["A", "B"], "text": ["bank", "mall"]},
    }  # fmt: skip
    expected = Item("x7", "Where?\n(A) bank\n(B) mall", "B", "choice", ("A", "B"), ("bank", "mall"), "B")
    for path in (tmp_path / "validation-00000-of-00001.parquet", tmp_path / "b.json", tmp_path / "c.jsonl.gz"):
        if path.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist([record]), path)
        elif path.suffix == ".gz":
            path.write_bytes(gzip.compress(json.dumps(record).encode()))
        else:  # JSON Lines by another name
            path.write_text(f"{json.dumps(record)}\n{json.dumps(record | {'id': 'x8'})}\n")
        task = load_task("csqa", path)
        assert task.items[0] == expected and len(task.items) == (2 if path.suffix == ".json" else 1)
    listed = record | {"choices": [{"label": "A", "text": "bank"}, {"label": "B", "text": "mall"}]}
    assert load_task("csqa", written(tmp_path / "d.jsonl", listed)).items == (expected,)
    path = tmp_path / "main-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([GSM8K, GSM8K]), path)
    assert [(item.id, item.gold) for item in load_task("gsm8k", path).items] == [("1", "1450"), ("2", "1450")]
    for choices, message in (
        (
            {"label": ["A"], "text": ["bank", "mall"]},
            "field 'choices': label and text must be lists of the same length",
        ),
        ({"label": ["A", "B"]}, "field 'choices.text' is missing, there are 'label'"),
        ({"label": ["A"], "text": ["bank"]}, "field 'choices' must be a list of at least two choices"),
        ({"label": ["A", ""], "text": ["bank", "mall"]}, "field 'choices[1].label' is blank"),
        (3, "field 'choices' must be a list of at least two choices"),
    ):
        with pytest.raises(InputError) as error:
            load_task("csqa", written(tmp_path / "e.jsonl", record | {"choices": choices}))
        assert str(error.value).endswith(f"e.jsonl, line 1: {message}")


def test_finders_fit_the_kind(tmp_path: Path) -> None:
    (number,) = load_task("gsm8k", written(tmp_path / "a.jsonl", GSM8K)).items
    assert number.finder.canonical("first 3, then $1,450.00 in all") == number.gold
    (choice,) = load_task("csqa", written(tmp_path / "b.jsonl", CSQA)).items
    assert choice.finder.canonical("Not A but (B).") == choice.gold
    assert choice.finder.canonical("C") is None


def test_any_file_by_templates(tmp_path: Path) -> None:
    records = [{"q": "2+2?", "a": {"n": 4.0}, "key": "u"}, {"q": "3-5?", "a": {"n": -2}, "key": "v"}]
    task = load_task(
        CustomTask("Now: {q}", "{a[n]:g}", "number", id="{key}"), written(tmp_path / "sums.jsonl", *records)
    )
    assert [(item.id, item.question, item.gold) for item in task.items] == [
        ("u", "Now: 2+2?", "4"), ("v", "Now: 3-5?", "-2"),
    ]  # fmt: skip
    assert (task.name, task.kind) == ("sums", "number")
    records = [{"q": "Sky?", "options": ["red", "blue"], "a": "Blue"}]
    how = CustomTask("{q}", "{a}", "choice", ("{options[0]}", "{options[1]}", "none"))
    (item,) = load_task(how, written(tmp_path / "colours.json", *records)).items
    assert (item.choices, item.gold, item.id) == (("red", "blue", "none"), "blue", "1")
    (item,) = load_task(CustomTask("{q}", "{a}", "text"), written(tmp_path / "t.jsonl", *records)).items
    assert item.gold == item.finder.canonical("“Blue”.\n") == "blue"
    towns = [{"q": "Which?", "a": "St. Louis."}, {"q": "Which?", "a": "St. Paul"}]
    first, second = load_task(CustomTask("{q}", "{a}", "text"), written(tmp_path / "u.jsonl", *towns)).items
    assert (first.gold, second.gold) == ("st. louis", "st. paul")
    assert first.finder.canonical("St. Louis. It lies on the Mississippi") == first.gold


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("gsm8k", {"answer": "#### 1"}, "f.jsonl, line 2: field 'question' is missing, there are 'answer'"),
        ("gsm8k", GSM8K | {"answer": "1450"}, "f.jsonl, line 2: field 'answer' has no gold answer, it must"),
        ("gsm8k", GSM8K | {"answer": "#### many"}, "line 2: field 'answer', after ####, = 'many': holds no number"),
        ("gsm8k", GSM8K | {"question": " "}, "f.jsonl, line 2: field 'question' is blank"),
        ("gsm8k", GSM8K | {"question": 3}, "f.jsonl, line 2: field 'question' = 3: must be a text"),
        ("gsm8k", ["a list"], "line 2: a record must be an object with fields, not ['a list']"),
        ("gsm8k", '{"question": ', "f.jsonl, line 2: not valid JSON"),
        ("gsm8k", '{"question": "\\ud800", "answer": "#### 1"}', "line 2: character 0 is an unpaired surrogate"),
        ("csqa", CSQA | {"answerKey": "C"}, "line 2: field 'answerKey' = 'C': must be one of A, B"),
        ("csqa", CSQA | {"question": "Where?"}, "line 2: field 'question' must be an object with fields"),
        ("csqa", CSQA | {"question": {"stem": "x", "choices": []}}, "'question.choices' must be a list of at least"),
        ("csqa", CSQA | {"question": {"stem": "x", "choices": [{}, {}]}}, "'question.choices[0].label' is missing"),
        ("csqa", {**CSQA, "id": "same"}, "line 2: id 'same' is also that of line 1"),
        ("multiarith", MULTIARITH | {"lSolutions": []}, "'lSolutions' = []: must be a list of one number"),
        ("multiarith", MULTIARITH | {"iIndex": "3"}, "field 'iIndex' = '3': must be an integer"),
        ("multiarith", MULTIARITH | {"iIndex": 9}, "line 2: id '9' is also that of line 1"),
        ("coin_flip", COIN | {"answer": "maybe"}, "line 2: field 'answer' = 'maybe': must be one of yes, no"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path: Path, task: str, record: Any, message: str) -> None:
    good = {
        "gsm8k": GSM8K, "csqa": CSQA | {"id": "same"}, "multiarith": MULTIARITH | {"iIndex": 9}, "coin_flip": COIN,
    }[task]  # fmt: skip
    with pytest.raises(InputError) as error:
        load_task(task, written(tmp_path / "f.jsonl", good, record))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_wrong_files_of_any_form(tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", {"q": "1?", "a": "x"})
    for how, message in (
        (lambda: CustomTask("{q}", "{a}", "number"), "line 1: --answer = 'x': holds no number"),
        (lambda: CustomTask("{p}", "{a}", "text"), "line 1: --question names 'p', the record has fields q, a"),
        (
            lambda: CustomTask("{q}", "No. {a} it is", "text"),
            "line 1: --answer = 'No. x it is': must be no more than a sentence, only 'No' would count",
        ),
        (lambda: CustomTask("{q}", "{a}", "choice", ("yes", "no")), "--answer = 'x': must be one of yes, no"),
        (lambda: CustomTask("{q}", "{a}", "choice", ("x", "{b}")), "--choices names 'b'"),
        (lambda: CustomTask("{q}", "{a}", "choice", ("x", "X")), "line 1: choices options = ('x', 'X'): must differ"),
        (lambda: CustomTask("{q}", "{a}", "choice", ("x",)), "--choices = ('x',): must be at least two"),
        (lambda: CustomTask("{q}", "{a}", "text", ("x", "y")), "cannot be combined with --kind text"),
        (lambda: CustomTask("question", "{a}", "text"), "--question = 'question': it names no field"),
        (lambda: CustomTask("{q}", "{a", "text"), "--answer = '{a'"),
        (lambda: CustomTask("{q}", "{a}", "numbers"), "--kind = 'numbers': must be one of number, choice, text"),  # type: ignore[arg-type]
        (lambda: "squad", "--task = 'squad': must be one of gsm8k, csqa, multiarith, coin_flip"),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            load_task(how(), path)
        assert message in str(error.value)
    for name, content, message in (
        ("none.jsonl", None, "none.jsonl: cannot be read (No such file or directory)"),
        ("empty.jsonl", "\n", "empty.jsonl: is empty"),
        ("empty.json", "[]", "empty.json: holds no records"),
        ("text.txt", "hello", "text.txt: must be a .jsonl or .json file"),
        ("object.json", "{}", "must be a list of records"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
            load_task("gsm8k", tmp_path / name)

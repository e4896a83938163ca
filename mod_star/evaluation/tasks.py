"""Tasks: files of questions with a gold answer each.

| task         | file                                                                                               |
|--------------|----------------------------------------------------------------------------------------------------|
| `gsm8k`      | `question`, `answer` (a worked solution, the gold number after `####`); Cobbe et al. 2021           |
| `csqa`       | `question.stem`, `question.choices[].label/text`, `answerKey`, `id`; Talmor et al. 2019. Or         |
|              | `question`, `choices.label/text[]`, as the `datasets` library has it                                |
| `multiarith` | `sQuestion`, `lSolutions` (one number), `iIndex`; Roy and Roth 2015                                 |
| `coin_flip`  | `question`, `answer` (yes or no); Wei et al. 2022, in the form of Kojima et al. 2022                |

Any other file is a task too if one says how a record becomes a question, an answer and choices: `CustomTask`.
Files are JSON, JSON Lines, CSV or Parquet, as `mod_star.data.files` reads them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mod_star.data.files import read_bytes, read_records
from mod_star.data.templates import Template
from mod_star.decoding.answers import Finder, LastNumber, LastOption, Phrase
from mod_star.errors import InputError, require
from mod_star.tokenization.unicode_text import unicode_text

Kind = Literal["number", "choice", "text"]
KINDS: tuple[Kind, ...] = ("number", "choice", "text")

_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's notes to a calculator, inside worked solutions
_NUMBERS, _PHRASES = LastNumber(), Phrase()


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str
    """Unique in its task."""
    question: str
    """As it is put to the model, choices included where the task shows them."""
    gold: str
    """The right answer in canonical form; for a choice, one of `choices`."""
    kind: Kind
    choices: tuple[str, ...] = ()
    """What may be answered: letters, words. Empty unless `kind` is choice."""
    choice_texts: tuple[str, ...] = ()
    """What each choice stands for ("bank" for "A"); the choices themselves where they are words."""
    solution: str = ""
    """How an example answers the question: a worked solution that ends in the answer, or the answer alone."""
    gold_text: str = ""
    """The gold number as the file spells it; empty if it isn't a number."""
    published: str = ""
    """GSM8K's own worked solution, #### and notes to a calculator included: what lm-evaluation-harness shows."""

    def gold_by(self, rule: Finder | None) -> str:
        """The right answer in the spelling of a rule other than our own."""
        return self.gold if rule is None else rule.spell(self.gold_text or self.gold)

    @property
    def finder(self) -> Finder:
        """Finds answers of this item's kind in a text."""
        if self.kind == "choice":
            return LastOption(self.choices)
        return _NUMBERS if self.kind == "number" else _PHRASES


@dataclass(frozen=True)
class Task:
    """The questions of one file."""

    name: str
    path: str
    items: tuple[Item, ...]
    sha256: str
    """Of the file."""

    @property
    def kind(self) -> Kind:
        """The kind of all its answers."""
        return self.items[0].kind


@dataclass(frozen=True)
class CustomTask:
    """How the records of any file are read. `question`, `answer` and `id` are templates over a record's fields.

    Raises:
      InputError: a template is malformed, the kind is unknown, or choices are missing or not wanted.
    """

    question: str
    """Such as "{question}", or "{passage}\\n{question}"."""
    answer: str
    """Such as "{answer}": a text that gives a number (`LastNumber`); for a choice, one of `choices`."""
    kind: Kind
    choices: tuple[str, ...] = ()
    """For a choice: words ("yes", "no"), or templates that take them from the record ("{options[0]}")."""
    id: str | None = None
    """None: the number of the line or record."""

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "--kind", self.kind, f"must be one of {', '.join(KINDS)}")
        if self.kind == "choice":
            require(len(self.choices) > 1, "--choices", self.choices, "must be at least two for --kind choice")
        else:
            require(not self.choices, "--choices", self.choices, f"cannot be combined with --kind {self.kind}")
        self.reader()

    def reader(self) -> Reader:
        """The function from a record, and where it stands, to an item."""
        question, answer = Template(self.question, "--question"), Template(self.answer, "--answer")
        identity = None if self.id is None else Template(self.id, "--item-id")
        choices = [Template(choice, "--choices") if "{" in choice else choice for choice in self.choices]

        def read(record: Any, where: str) -> Item:
            names = tuple(name if isinstance(name, str) else name.render(record, where) for name in choices)
            solution = answer.render(record, where)
            gold, gold_text = _gold(solution, self.kind, names, where, "--answer")
            return Item(
                id=_number_of(where) if identity is None else identity.render(record, where),
                question=_not_blank(question.render(record, where), where, "--question"),
                gold=gold,
                kind=self.kind,
                choices=names,
                choice_texts=names,
                solution=solution.strip(),
                gold_text=gold_text,
            )

        return read


Reader = Callable[[Any, str], Item]


def load_task(task: str | CustomTask, path: str | Path) -> Task:
    """Reads and checks a file of questions.

    Args:
      task: a name of `TASKS`, or how to read any other file.
      path: the file.

    Raises:
      InputError: an unknown task; a file that can't be read, is no JSON, or has no records; a record with a missing or
        unusable field, without an answer, or with the id of another. One line with file, line and field.
    """
    if isinstance(task, str):
        require(task in TASKS, "--task", task, f"must be one of {', '.join(TASKS)}, or --question, --answer and --kind")
        name, read = task, TASKS[task]
    else:
        name, read = Path(path).stem, task.reader()
    items: dict[str, tuple[Item, str]] = {}
    for record, where in read_records(str(path)):
        item = read(record, where)
        if item.id in items:
            raise InputError(f"{where}: id {item.id!r} is also that of {items[item.id][1].rpartition(', ')[2]}")
        items[item.id] = item, where
    digest = hashlib.sha256(read_bytes(str(path))).hexdigest()
    return Task(name, str(path), tuple(item for item, _ in items.values()), digest)


def choice_lines(labels: tuple[str, ...], texts: tuple[str, ...]) -> str:
    """Choices as a question shows them: "(A) bank", one a line."""
    return "\n".join(f"({label}) {text}" for label, text in zip(labels, texts, strict=True))


def _gsm8k(record: Any, where: str) -> Item:
    answer = _string(record, "answer", where)
    worked, mark, last = answer.rpartition("####")
    if not mark:
        raise InputError(f"{where}: field 'answer' has no gold answer, it must stand after ####")
    gold, gold_text = _gold(last, "number", (), where, "field 'answer', after ####,")
    worked = _CALCULATOR.sub("", worked).strip()
    return Item(
        _number_of(where), _string(record, "question", where), gold, "number",
        solution=f"{worked}\nThe answer is {gold}.", gold_text=gold_text, published=answer,
    )  # fmt: skip


def _csqa(record: Any, where: str) -> Item:
    question = _field(record, "question", where)
    if isinstance(question, str) and "choices" in record:  # as the `datasets` library has it
        stem, name, holder = _string(record, "question", where), "choices", record
    else:
        stem, name, holder = _string(question, "stem", where, "question.stem"), "question.choices", question
    entries = _field(holder, "choices", where, name)
    if isinstance(entries, Mapping):
        entries = _columns(entries, where, name)
    if not isinstance(entries, list) or len(entries) < 2:
        raise InputError(f"{where}: field {name!r} must be a list of at least two choices")
    labels, texts = (
        tuple(_string(entry, key, where, f"{name}[{n}].{key}") for n, entry in enumerate(entries))
        for key in ("label", "text")
    )
    gold, _ = _gold(_string(record, "answerKey", where), "choice", labels, where, "field 'answerKey'")
    shown = f"{stem}\n{choice_lines(labels, texts)}"
    return Item(_string(record, "id", where), shown, gold, "choice", labels, texts, gold)


def _columns(choices: Mapping[str, Any], where: str, name: str) -> list[dict[str, Any]]:
    """Choices that are given as a list of labels and a list of texts, one by one."""
    labels, texts = (_field(choices, key, where, f"{name}.{key}") for key in ("label", "text"))
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        raise InputError(f"{where}: field {name!r}: label and text must be lists of the same length")
    return [{"label": label, "text": text} for label, text in zip(labels, texts, strict=True)]


def _multiarith(record: Any, where: str) -> Item:
    question, solutions = _string(record, "sQuestion", where), _field(record, "lSolutions", where)
    numbers = isinstance(solutions, list) and all(type(x) in (int, float) for x in solutions)
    if not numbers or len(solutions) != 1:
        raise InputError(f"{where}: field 'lSolutions' = {_short(solutions)}: must be a list of one number")
    index = _field(record, "iIndex", where)
    if type(index) is not int:
        raise InputError(f"{where}: field 'iIndex' = {_short(index)}: must be an integer")
    gold, _ = _gold(str(solutions[0]), "number", (), where, "field 'lSolutions'")
    return Item(str(index), question, gold, "number", solution=gold)


def _coin_flip(record: Any, where: str) -> Item:
    choices = ("yes", "no")
    gold, _ = _gold(_string(record, "answer", where), "choice", choices, where, "field 'answer'")
    return Item(_number_of(where), _string(record, "question", where), gold, "choice", choices, choices, gold)


TASKS: dict[str, Reader] = {"gsm8k": _gsm8k, "csqa": _csqa, "multiarith": _multiarith, "coin_flip": _coin_flip}


def _field(record: Any, name: str, where: str, shown: str | None = None) -> Any:
    """A field of a record; `shown` is its name in errors."""
    shown = name if shown is None else shown
    if not isinstance(record, Mapping):
        outer = shown.rpartition(".")[0]
        what = f"field {outer!r}" if outer else "a record"
        raise InputError(f"{where}: {what} must be an object with fields, not {_short(record)}")
    if name not in record:
        raise InputError(f"{where}: field {shown!r} is missing, there are {', '.join(map(repr, record)) or 'none'}")
    return record[name]


def _string(record: Any, name: str, where: str, shown: str | None = None) -> str:
    """A field that must be a text with something in it, without white space around it."""
    value = _field(record, name, where, shown)
    what = f"field {name if shown is None else shown!r}"
    if not isinstance(value, str):
        raise InputError(f"{where}: {what} = {_short(value)}: must be a text")
    return _not_blank(unicode_text(value, where), where, what)


def _not_blank(text: str, where: str, what: str) -> str:
    if not text.strip():
        raise InputError(f"{where}: {what} is blank")
    return text.strip()


def _gold(spelled: str, kind: Kind, choices: tuple[str, ...], where: str, what: str) -> tuple[str, str]:
    """The gold answer in canonical form, and if it is a number as the file spells it."""
    if kind == "choice":
        try:
            LastOption(choices)
        except InputError as error:
            raise InputError(f"{where}: choices {error}") from None
        gold = next((name for name in choices if name.casefold() == spelled.strip().casefold()), None)
        if gold is None:
            raise InputError(f"{where}: {what} = {_short(spelled.strip())}: must be one of {', '.join(choices)}")
        return gold, ""
    finder: Finder = _NUMBERS if kind == "number" else _PHRASES
    span = finder.find(spelled)
    if span is None:
        missing = "no number" if kind == "number" else "no answer"
        raise InputError(f"{where}: {what} = {_short(spelled.strip())}: holds {missing}")
    answer = spelled[span[0] : span[1]]
    if kind == "text" and re.search(r"\w", spelled[span[1] :]):
        raise InputError(
            f"{where}: {what} = {_short(spelled.strip())}: must be no more than a sentence, only {answer!r} would count"
        )
    return finder.spell(answer), answer if kind == "number" else ""


def _number_of(where: str) -> str:
    """The number of a line or record, as its id."""
    return where.rpartition(" ")[2]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""Asking a model many questions in several wordings, with branches and samples of each: what the experiments on
CoT-decoding of pretrained models share. What was asked is kept; interrupted or out of time, it goes on later."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.support.small_records import small, with_texts
from mod_star.decoding.confidence import ConfidenceConfig
from mod_star.errors import require
from mod_star.evaluation.prompts import PLAIN, Prompts, subset
from mod_star.evaluation.records import Record, Records, open_records
from mod_star.evaluation.tasks import CustomTask, Item, Task, load_task

ROWS = 10
"""Branches of a question, and samples of it."""
TEMPERATURE = 0.7
"""Of samples."""
STOP = ("\nQ:",)
"""A text that goes on with a question of its own ends there."""


@dataclass(frozen=True)
class Part:
    """One task: its file, how many of its questions, how long an answer may be."""

    task: str
    file: str
    items: int
    new_tokens: int
    how: CustomTask | None = None
    """How its records are read; None: as those of the task of that name."""

    def load(self, data: Path) -> Task:
        """Its questions, from a directory of files."""
        return load_task(self.how or self.task, data / self.file)


@dataclass(frozen=True)
class Wording:
    """How questions are put."""

    template: str | None = PLAIN
    """None: the one that `Prompts` takes by itself."""
    chat: bool = False
    step_by_step: bool = False


@dataclass(frozen=True)
class Study:
    """Which questions are asked, how, and what is measured of the answers."""

    parts: tuple[Part, ...]
    wordings: Mapping[str, Wording]
    """By the names that records and tables know them by."""
    confidence: ConfidenceConfig | None = None
    with_texts: int | None = None
    """Records are small, and hold texts for so many questions alone: the first where greedy and CoT-decoding answer
    differently. None: records are those of `mod_star.evaluation`, with all texts."""


@dataclass(frozen=True)
class Asking:
    """What a command line says of asking."""

    run: Path
    """A run directory made by mod-star import."""
    out: Path
    """Where records, tables and the picture are kept."""
    data: Path = Path("data")
    """Directory of the files of questions, see experiments.get_data."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the model; logits, Δ and log-probabilities are float32 whatever it is."""
    weights: Literal["int8"] | None = None
    """int8: quantise the weights of matrix products when loading; not given: as they are stored."""
    minutes: float | None = None
    """Begin no question after this time, loading included; not given: ask all."""
    questions: int = 8
    """Questions at a time, ten rows each; changes speed and memory."""
    limit: int | None = None
    """Only this many questions per task and prompt, to try it."""
    only: tuple[str, ...] = ()
    """Only these tasks and wordings, such as multiarith or "multiarith, bare"; none given: all of them."""
    report: bool = False
    """Only report, on what there is."""


@dataclass(frozen=True)
class Turn:
    """Questions that are asked at a time, in one wording."""

    part: Part
    wording: str
    first: int
    """Number of its first question among those of the task."""
    items: Sequence[Item]

    def id_of(self, item: Item) -> str:
        """The name of the record of a question in this wording."""
        return f"{self.part.task}/{self.wording}/{item.id}"


def turns(study: Study, options: Asking) -> Iterator[Turn]:
    """All that is asked; tasks and wordings take turns by their sizes, so that an early report is fair. Of the turns of
    one time those of one wording come together.

    Raises:
      InputError: `only` names something else than a task, or a task and a wording.
    """
    names = {part.task for part in study.parts} | {
        f"{part.task}, {wording}" for part in study.parts for wording in study.wordings
    }
    for name in options.only:
        require(name in names, "--only", name, f"must be one of {', '.join(sorted(names))}")
    placed = []
    for part in study.parts:
        items = list(subset(part.load(options.data).items, part.items, seed=0))
        random.Random(0).shuffle(items)  # so that what there is early is a fair sample, too
        items = items[: options.limit]
        for place, wording in enumerate(study.wordings):
            if options.only and not {part.task, f"{part.task}, {wording}"} & {*options.only}:
                continue
            for first in range(0, len(items), options.questions):
                some = items[first : first + options.questions]
                placed.append((((first + options.questions / 2) / len(items), place), Turn(part, wording, first, some)))
    for _, turn in sorted(placed, key=lambda each: each[0]):
        yield turn


def settings(study: Study, options: Asking) -> dict[str, Any]:
    """What records depend on besides the model: those that were made with other settings are refused."""
    described: dict[str, Any] = {
        "dtype": options.dtype,
        "parts": [_described(part, options.data) for part in study.parts],
        "prompt": PLAIN,
        "stop": STOP,
        "rows": [ROWS, ROWS],
        "temperature": TEMPERATURE,
    }
    if options.weights is not None:
        described["weights"] = options.weights
    if study.confidence is not None:
        described["confidence"] = dataclasses.asdict(study.confidence)
    return described


def ask(study: Study, options: Asking, console: Console, depends_on: Mapping[str, Any]) -> None:
    """Generates what is missing, and keeps it.

    Args:
      study: what to ask.
      options: of which model, for how long, and where records are kept.
      console: gets a progress bar, or lines with the time.
      depends_on: the `settings` of the study that the records belong to, of which this one may be a part.
    """
    from mod_star.commands import keep_compiled_programs
    from mod_star.decoding import Generator
    from mod_star.runs.buckets import checkpoints_of
    from mod_star.runs.directory import load_run
    from mod_star.runs.integrity import params_digest

    began = time.monotonic()
    todo = list(turns(study, options))
    keep_compiled_programs()
    loaded = load_run(options.run, weights=options.weights, on_disk=True)
    decoder = loaded.decoder.clone(config=dataclasses.replace(loaded.decoder.config, dtype=options.dtype))
    generator = Generator(dataclasses.replace(loaded.model, decoder=decoder))
    config = {**depends_on, "checkpoint_sha256": params_digest(checkpoints_of(options.run), loaded.step)}

    def answered(turn: Turn) -> list[Record]:
        wording = study.wordings[turn.wording]
        prompts = Prompts(loaded.tokenizer, wording.template, chat=wording.chat, step_by_step=wording.step_by_step)
        return answer(generator, prompts, turn, study.confidence)

    end = None if options.minutes is None else began + 60 * options.minutes
    with open_records(options.out, config) as records:
        if not ask_missing(todo, records, answered, study.with_texts, console, end):
            console.print(f"{options.minutes:g} minutes are over; the same command goes on")


def ask_missing(
    todo: Sequence[Turn],
    records: Records,
    answered: Callable[[Turn], list[Record]],
    texts: int | None,
    console: Console,
    end: float | None,
) -> bool:
    """Asks the questions that have no record, in order, and keeps their records.

    Args:
      todo: all questions of the study.
      records: those that were made.
      answered: makes the records of a turn.
      texts: as `Study.with_texts`.
      console: gets a progress bar, or lines with the time.
      end: no turn begins after this time of `time.monotonic`; None: no limit.

    Returns:
      Whether all questions have a record.
    """
    wanted = {turn.id_of(item) for turn in todo for item in turn.items}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        line = bar.add_task("questions", total=len(wanted))
        for turn in todo:
            name = f"{turn.part.task}, {turn.wording}"
            if any(turn.id_of(item) not in records.by_id for item in turn.items):
                if end is not None and time.monotonic() > end:
                    return False
                for record in answered(turn):
                    if record["id"] not in records.by_id:
                        if texts is not None:
                            record = small(record, sum(map(with_texts, records.by_id.values())) < texts)
                        records.add(record)
                if not console.is_terminal:
                    done = len(wanted & records.by_id.keys())
                    print(f"{time.strftime('%H:%M:%S')} {name}: {done} of {len(wanted)}", flush=True)
            bar.update(line, advance=len(turn.items), description=name)
    return True


def _described(part: Part, data: Path) -> dict[str, Any]:
    described = dataclasses.asdict(part) | {"sha256": part.load(data).sha256}
    if part.how is None:
        del described["how"]
    return described


def answer(generator: Any, prompts: Prompts, turn: Turn, confidence: ConfidenceConfig | None) -> list[dict[str, Any]]:
    """The records of some questions; ten branches and ten samples each. What is drawn for a
    question does not depend on those beside it."""
    from mod_star.decoding import GenerationConfig
    from mod_star.decoding.cot import Reading, read_branches
    from mod_star.decoding.sampling import BRANCHING, Sampling
    from mod_star.decoding.text import complete_many
    from mod_star.evaluation.branch_records import branch_record

    part, items = turn.part, turn.items
    texts = [prompts.text(item) for item in items]
    encoded = [prompts.encode(item) for item in items]
    seed = random.Random(f"{part.task} {turn.wording}").getrandbits(31)
    numbers = range(turn.first, turn.first + len(items))
    reading = Reading(confidence=confidence)
    began = time.perf_counter()
    rows: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for name, sampling in (("branches", BRANCHING), ("samples", Sampling(TEMPERATURE))):
        rows[name] = {}
        config = GenerationConfig(
            part.new_tokens, sampling, STOP, branches=ROWS, seed=seed, rows=ROWS * len(items),
            confidence=confidence is not None,
        )  # fmt: skip
        for index, completions in complete_many(generator, texts, config, encoded, numbers):
            finder = items[index].finder
            (result,) = read_branches(generator, completions, config, finder, [encoded[index]], reading)
            rows[name][index] = [branch_record(branch) for branch in result.branches]
    seconds = (time.perf_counter() - began) / len(items)
    return [
        {
            "id": turn.id_of(item),
            "task": part.task,
            "prompt": turn.wording,
            "gold": item.gold,
            "question": item.question,
            "branches": rows["branches"][index],
            "samples": rows["samples"][index],
            "seconds": round(seconds, 3),
        }
        for index, item in enumerate(items)
    ]

"""CoT-decoding on a real model: SmolLM2-135M-Instruct on MultiArith, GSM8K and coin flips.

    mod-star import SmolLM2-135M-Instruct.gguf runs/smollm2    # see docs/how-to/get_data_and_models.md
    python -m experiments.cot_decoding_smollm2

Ten branches per question and prompt serve greedy decoding and CoT-decoding with every k up to 10 and every ranking;
ten samples serve sampling and self-consistency. Interrupted, the same command goes on; tasks and prompts take turns, so
that an early --report is balanced. README.md beside this file has the method, what was measured, and how to report on
the records that are kept in this repository.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.cot_decoding_smollm2.report import report
from mod_star.errors import InputError
from mod_star.evaluation.prompts import PLAIN, Prompts, subset
from mod_star.evaluation.records import open_records
from mod_star.evaluation.tasks import Item, Task, load_task

BRANCHES = SAMPLES = 10
TEMPERATURE = 0.7
STOP = ("\nQ:",)


@dataclass(frozen=True)
class Part:
    """One task: its file, how many of its questions, how long an answer may be."""

    task: str
    file: str
    items: int
    new_tokens: int


PARTS = (
    Part("multiarith", "multiarith.json", 200, 128),
    Part("gsm8k", "gsm8k_test.jsonl", 200, 128),
    Part("coin_flip", "coin_flip.json", 100, 64),
)
PROMPTS = {"plain": False, "step by step": True}


@dataclass(frozen=True)
class Options:
    """Asks every question under both prompts, and reports. Interrupted, the same command goes on."""

    data: Path = Path("data")
    """Directory of multiarith.json, gsm8k_test.jsonl and coin_flip.json."""
    run: Path = Path("runs/smollm2")
    """A run directory made by mod-star import."""
    out: Path = Path("runs/cot_decoding_smollm2")
    """Where records, tables and the picture are kept."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type of the model; logits, Δ and log-probabilities are float32 whatever it is."""
    questions: int = 8
    """Questions at a time, ten rows each; changes speed and memory."""
    limit: int | None = None
    """Only this many questions per task and prompt, to try it."""
    report: bool = False
    """Only report, on what there is."""


def chunks(options: Options) -> Iterator[tuple[Part, Task, str, int, Sequence[Item]]]:
    """(part, task, prompt, number, questions), tasks and prompts taking turns in proportion to their sizes."""
    turns = []
    for part in PARTS:
        task = load_task(part.task, options.data / part.file)
        items = list(subset(task.items, part.items, seed=0))
        random.Random(0).shuffle(items)  # so that what there is early is a fair sample, too
        items = items[: options.limit]
        count = -(-len(items) // options.questions)
        for prompt in PROMPTS:
            for number in range(count):
                chunk = items[number * options.questions : (number + 1) * options.questions]
                turns.append(((number + 0.5) / count, part, task, prompt, number, chunk))
    for _, part, task, prompt, number, chunk in sorted(turns, key=lambda turn: turn[0]):
        yield part, task, prompt, number, chunk


def record_id(part: Part, prompt: str, item: Item) -> str:
    """Names a question under a prompt."""
    return f"{part.task}/{prompt}/{item.id}"


def ask(options: Options, console: Console) -> None:
    """Generates and keeps what is missing."""
    import dataclasses

    from mod_star.commands import keep_compiled_programs
    from mod_star.decoding import Generator
    from mod_star.runs.buckets import checkpoints_of
    from mod_star.runs.directory import load_run
    from mod_star.runs.integrity import params_digest

    todo = list(chunks(options))
    keep_compiled_programs()
    loaded = load_run(options.run)
    decoder = loaded.decoder.clone(config=dataclasses.replace(loaded.decoder.config, dtype=options.dtype))
    generator = Generator(dataclasses.replace(loaded.model, decoder=decoder))
    config = {
        "dtype": options.dtype,
        "parts": [dataclasses.asdict(part) | {"sha256": load_task(part.task, options.data / part.file).sha256}
                  for part in PARTS],
        "prompt": PLAIN,
        "stop": STOP,
        "rows": [BRANCHES, SAMPLES],
        "temperature": TEMPERATURE,
        "checkpoint_sha256": params_digest(checkpoints_of(options.run), loaded.step),
    }  # fmt: skip
    total = sum(len(chunk) for *_, chunk in todo)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    with open_records(options.out, config) as records, bar:
        line = bar.add_task("questions", total=total)
        for part, _, prompt, number, chunk in todo:
            missing = [item for item in chunk if record_id(part, prompt, item) not in records.by_id]
            if missing:
                prompts = Prompts(loaded.tokenizer, PLAIN, chat=True, step_by_step=PROMPTS[prompt])
                for record in answer(generator, prompts, part, prompt, number, chunk):
                    if record["id"] not in records.by_id:
                        records.add(record)
            bar.update(line, advance=len(chunk), description=f"{part.task}, {prompt}")
            if not console.is_terminal:
                print(f"{time.strftime('%H:%M:%S')} {part.task}, {prompt}: {len(records.by_id)} of {total}", flush=True)


def answer(
    generator: Any, prompts: Prompts, part: Part, prompt: str, number: int, items: Sequence[Item]
) -> list[dict[str, Any]]:
    """The records of some questions; ten branches and ten samples each. The same questions give the same samples."""
    from mod_star.decoding import GenerationConfig
    from mod_star.decoding.cot import Reading, read_branches
    from mod_star.decoding.sampling import BRANCHING, Sampling
    from mod_star.decoding.text import complete_many
    from mod_star.evaluation.branch_records import branch_record

    texts = [prompts.text(item) for item in items]
    encoded = [prompts.encode(item) for item in items]
    seed = random.Random(f"{part.task} {prompt} {number}").getrandbits(31)
    began = time.perf_counter()
    rows: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for name, sampling in (("branches", BRANCHING), ("samples", Sampling(TEMPERATURE))):
        rows[name] = {}
        config = GenerationConfig(
            part.new_tokens, sampling, STOP, branches=BRANCHES, seed=seed, rows=BRANCHES * len(items)
        )
        for index, completions in complete_many(generator, texts, config, encoded):
            finder = items[index].finder
            (result,) = read_branches(generator, completions, config, finder, [encoded[index]], Reading())
            rows[name][index] = [branch_record(branch) for branch in result.branches]
    seconds = (time.perf_counter() - began) / len(items)
    return [
        {
            "id": record_id(part, prompt, item),
            "task": part.task,
            "prompt": prompt,
            "gold": item.gold,
            "question": item.question,
            "branches": rows["branches"][index],
            "samples": rows["samples"][index],
            "seconds": round(seconds, 3),
        }
        for index, item in enumerate(items)
    ]


def main() -> None:
    """Asks what is missing and reports."""
    options = tyro.cli(Options, prog="python -m experiments.cot_decoding_smollm2")
    console = Console()
    try:
        if not options.report:
            ask(options, console)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        console.print("interrupted; what was asked is kept, the same command goes on")
    report(options.out, console)

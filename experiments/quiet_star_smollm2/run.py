"""Quiet-STaR on a real model: SmolLM2-135M-Instruct learns to think on GSM8K training text.

    mod-star import SmolLM2-135M-Instruct.gguf runs/smollm2    # see docs/how-to/get_data_and_models.md
    python -m experiments.quiet_star_smollm2                   # hours of one core; interrupted, it goes on
    python -m experiments.quiet_star_smollm2 --report          # on what there is

`argmax` counts answers whose every token is the most probable of those that answers are made of, `greedy` those whose
every token is the most probable of all. README.md beside this file has the method and what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import track

from experiments.quiet_star_smollm2.report import report
from mod_star.commands import keep_compiled_programs
from mod_star.config import DataConfig, OptimizerConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.decoding import Think
from mod_star.errors import InputError
from mod_star.evaluation.likelihood import ExpectedProbability
from mod_star.evaluation.prompts import Prompts, subset
from mod_star.evaluation.protocols import Subject
from mod_star.evaluation.records import RECORDS_FILE, open_records
from mod_star.evaluation.tasks import load_task
from mod_star.model import Decoder
from mod_star.runs.directory import LoadedRun, load_run
from mod_star.runs.stored_config import is_run, read_config
from mod_star.training.interrupt import Interrupted
from mod_star.training.train import train

THINKING = ThinkingConfig(
    thought_length=6,
    n_true=3,
    n_thoughts=2,
    policy_weight=3.0,  # n_true: measured when rewards, sums over n_true tokens, were divided by thoughts
    think_fraction=0.25,
    think_where="entropy",
    baseline="leave_one_out",
    drop_negative=False,
    chunk=16,
)
TRAINED = "trained on"
ARMS: dict[str, ThinkingConfig | None] = {TRAINED: None, "quiet-star": THINKING}
EVALUATIONS = (
    ("before", Think()),
    (TRAINED, Think()),
    ("quiet-star", Think()),
    ("quiet-star", Think("always")),
)
TASKS = {"gsm8k": "gsm8k_test.jsonl", "csqa": "csqa_dev.jsonl"}


@dataclass(frozen=True)
class Options:
    """Trains both arms, evaluates them and the model before, and reports. Interrupted, the same command goes on."""

    base: Path = Path("runs/smollm2")
    """Run to go on from, as `mod-star import` makes it."""
    data: Path = Path("data")
    """Where gsm8k_train.jsonl, gsm8k_test.jsonl and csqa_dev.jsonl are."""
    out: Path = Path("runs/quiet_star_smollm2")
    """Where runs, answers, tables and the picture are kept."""
    steps: int = 100
    """Steps per arm, each on 2 sequences of 128 tokens."""
    items: int = 200
    """Questions per task, drawn at random."""
    learning_rate: float = 2e-5
    """Constant after ten steps of warm-up."""
    batch_size: int = 8
    """Questions that are evaluated at a time."""
    report: bool = False
    """Only report, on what there is."""


def config(options: Options, thinking: ThinkingConfig | None) -> RunConfig:
    """One arm."""
    base = read_config(options.base)
    return replace(
        base,
        model=replace(base.model, context=128),
        data=DataConfig(
            source=(str(options.data / "gsm8k_train.jsonl"),),
            template="Q: {question}\nA: {answer}",
            tokenizer=base.data.tokenizer,
        ),
        optimizer=OptimizerConfig(
            learning_rate=options.learning_rate, schedule="constant", warmup_steps=10, weight_decay=0.001
        ),
        train=TrainConfig(
            objective="quiet_star" if thinking else "next_token",
            steps=options.steps,
            batch_size=2,
            loss_chunk=64,
            log_every=1,
            eval_every=0,
            eval_batches=8,
            checkpoint_every=10,
            keep_checkpoints=1,
        ),
        thinking=thinking or ThinkingConfig(),
        init_from=str(options.base),
    )


def answers(out: Path, arm: str, think: Think, task: str) -> Path:
    """Directory of the records of one evaluation."""
    return out / "answers" / f"{arm.replace(' ', '_')}-{think.when}-{task}"


def answer(options: Options, arm: str, think: Think, console: Console) -> None:
    """Evaluates an arm on what is missing of all tasks."""
    run: LoadedRun | None = None
    for task, file in TASKS.items():
        questions = load_task(task, options.data / file)
        items = subset(questions.items, options.items, seed=0)
        config = {"items": options.items, "data_sha256": questions.sha256}
        with open_records(answers(options.out, arm, think, task), config) as records:
            missing = [pair for pair in enumerate(items) if pair[1].id not in records.by_id]
            if not missing:
                continue
            run = run or load_run(options.base if arm == "before" else options.out / arm.replace(" ", "_"))
            # Trained on 128 tokens, which not all questions fit into; the model was made for 8,192.
            decoder = Decoder(replace(run.config.model, context=512), run.config.routing, run.decoder.parts)
            thinking = run.config.thinking if "thinking" in run.params else None
            subject = Subject(decoder, run.params, run.tokenizer, Prompts(run.tokenizer), thinking, think)
            for record in track(
                ExpectedProbability(options.batch_size).records(subject, missing),
                f"{arm}, thinking {think.when}: {task}", len(missing), console=console,
            ):  # fmt: skip
                records.add(record)


def main() -> None:
    """Does what has not been done and reports."""
    options, console = tyro.cli(Options, prog="python -m experiments.quiet_star_smollm2"), Console()
    keep_compiled_programs()
    if not options.report:
        if not is_run(options.base):
            raise SystemExit(f"{options.base}: is not a run; make it with mod-star import")
        try:
            answer(options, *EVALUATIONS[0], console)
            for arm, thinking in ARMS.items():
                train(config(options, thinking), options.out / arm.replace(" ", "_"))
                for name, think in EVALUATIONS:
                    if name == arm:
                        answer(options, arm, think, console)
        except (InputError, Interrupted) as error:
            raise SystemExit(f"stopped: {error}") from error
    files = {
        f"{arm}, thinking" if think.when == "always" else arm: {
            task: answers(options.out, arm, think, task) / RECORDS_FILE for task in TASKS
        }
        for arm, think in EVALUATIONS
    }
    report(options.out, files, console)

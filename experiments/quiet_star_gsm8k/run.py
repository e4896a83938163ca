"""Quiet-STaR on grade-school maths, in short form: does thinking help a small model predict the next token?

    python -m experiments.mod_vs_dense        # the base models, hours; --seeds 1 for one
    python -m experiments.quiet_star_gsm8k    # this

Goes on from the dense models of `experiments.mod_vs_dense` on the same text, with the same number of text tokens per
arm. README.md beside this file has what was measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from experiments.support.reporting import markdown, spread
from mod_star.config import OptimizerConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.errors import InputError
from mod_star.runs.stored_config import is_run, read_config
from mod_star.training.train import SUMMARY_FILE, train
from mod_star.views.terminal import result_table

# policy_weight is n_true: measured when rewards, sums over n_true tokens, were divided by the number of thoughts.
QUIET_STAR = ThinkingConfig(policy_weight=4.0, baseline="leave_one_out", drop_negative=False, embedding_rate=10.0)
ARMS: dict[str, ThinkingConfig | None] = {
    "trained on": None,
    "quiet-star": QUIET_STAR,
    "0.25 by entropy": replace(QUIET_STAR, think_fraction=0.25, think_where="entropy"),
    "0.25 at random": replace(QUIET_STAR, think_fraction=0.25),
    "no reinforce": replace(QUIET_STAR, policy_weight=0.0),
    "pause": replace(QUIET_STAR, kind="pause", policy_weight=0.0, n_thoughts=1),
}
MEASURES = (
    ("eval_base_loss", "no thought", "{:.4f}"),
    ("eval_talk_loss", "a thought", "{:.4f}"),
    ("eval_loss", "on budget", "{:.4f}"),
    ("eval_gain", "gain", "{:+.4f}"),
    ("hardest", "hardest 10 %", "{:+.3f}"),
    ("eval_mixing_weight", "w", "{:.3f}"),
)


@dataclass(frozen=True)
class Options:
    """Teaches every arm from the base model of every seed, and reports. Interrupted, the same command goes on."""

    base: Path = Path("runs/mod_vs_dense")
    """Where `experiments.mod_vs_dense` has left its runs."""
    out: Path = Path("runs/quiet_star_gsm8k")
    """Where the runs and the table are kept."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the base models to go on from."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which arms."""
    steps: int = 30
    """Steps per arm, each on 4 sequences of 128 tokens."""
    learning_rate: float = 3e-4
    """Constant after ten steps of warm-up."""
    report: bool = False
    """Only report, on what there is."""


def config(options: Options, arm: str, seed: int) -> RunConfig:
    """One arm, from the base model of one seed."""
    base = read_config(options.base / f"dense-{seed}")
    thinking = ARMS[arm]
    return replace(
        base,
        model=replace(base.model, context=128),
        optimizer=OptimizerConfig(
            learning_rate=options.learning_rate, schedule="constant", warmup_steps=10, weight_decay=0.01
        ),
        train=TrainConfig(
            objective="quiet_star" if thinking else "next_token",
            steps=options.steps,
            batch_size=4,
            seed=seed,
            loss_chunk=128,
            log_every=5,
            eval_every=0,
            eval_batches=24,
            checkpoint_every=20,
            keep_checkpoints=1,
        ),
        thinking=thinking or ThinkingConfig(),
        init_from=str(options.base / f"dense-{seed}"),
    )


def directory(options: Options, arm: str, seed: int) -> Path:
    """Where an arm's run is kept."""
    return options.out / f"{arm.replace(' ', '_')}-{seed}"


def read(options: Options, arm: str) -> list[dict[str, Any]]:
    """Held-out measures of an arm's complete runs."""
    found = []
    for seed in options.seeds:
        path = directory(options, arm, seed) / SUMMARY_FILE
        if path.is_file():
            summary = json.loads(path.read_text(encoding="utf-8"))
            measures = dict(summary["evaluation"])
            if "eval_talk_loss" in measures:
                measures["hardest"] = measures["eval_gain_by_decile"][-1]
            else:
                measures["eval_base_loss"] = measures["eval_loss"]
            found.append(measures)
    return found


def report(options: Options, console: Console) -> None:
    """Prints a table of what there is, and writes it to results.md."""
    rows = []
    for arm in ARMS:
        if runs := read(options, arm):
            cells = [spread([run[key] for run in runs], form) if key in runs[0] else "–" for key, _, form in MEASURES]
            rows.append([arm, *cells])
    columns = ["", *(title for _, title, _ in MEASURES)]
    console.print(result_table(f"Held-out text, nats per token; seeds: {len(options.seeds)}", columns, rows))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.md").write_text(markdown(columns, rows), encoding="utf-8")


def main() -> None:
    """Trains what is missing and reports."""
    options = tyro.cli(Options, prog="python -m experiments.quiet_star_gsm8k")
    for seed in options.seeds:
        base = options.base / f"dense-{seed}"
        if not is_run(base):
            raise SystemExit(f"{base}: is not a run; make it with python -m experiments.mod_vs_dense")
        for arm in options.arms if not options.report else ():
            try:
                train(config(options, arm, seed), directory(options, arm, seed))
            except InputError as error:
                raise SystemExit(f"error: {error}") from error
    report(options, Console())

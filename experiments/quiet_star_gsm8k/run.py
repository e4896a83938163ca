"""Quiet-STaR on grade-school maths, in short form: does thinking help a small model predict the next token?

    python -m experiments.mod_vs_dense        # the base models, hours; --seeds 1 for one
    python -m experiments.quiet_star_gsm8k    # this

Goes on from the dense models of `experiments.mod_vs_dense` on the same text, with the same number of text tokens per
arm. README.md beside this file has what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console

from experiments.quiet_star_gsm8k.report import directory, report
from mod_star.config import OptimizerConfig, RunConfig, ThinkingConfig, TrainConfig
from mod_star.errors import InputError
from mod_star.runs.stored_config import is_run, read_config
from mod_star.training.train import train

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


def main() -> None:
    """Trains what is missing and reports."""
    options = tyro.cli(Options, prog="python -m experiments.quiet_star_gsm8k")
    for seed in options.seeds:
        base = options.base / f"dense-{seed}"
        if not is_run(base):
            raise SystemExit(f"{base}: is not a run; make it with python -m experiments.mod_vs_dense")
        for arm in options.arms if not options.report else ():
            try:
                train(config(options, arm, seed), directory(options.out, arm, seed))
            except InputError as error:
                raise SystemExit(f"error: {error}") from error
    report(options.out, tuple(ARMS), options.seeds, Console())

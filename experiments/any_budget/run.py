"""One model for four budgets against a model for each alone, its causal rules, and budgets that a batch shares.

    python -m experiments.any_budget             # trains what is missing, then measures and reports
    python -m experiments.any_budget --report    # measures and reports on what there is

`--out` holds the runs. One run at a time; interrupted, the same command goes on. README.md beside this file has the
claim, the data and what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from mod_star.config import DataConfig, ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, TrainConfig

BUDGETS = (1.0, 0.5, 0.25, 0.125)
ANY = "any"
ARMS = {ANY: RoutingConfig(budgets=BUDGETS), **{f"{each:g}": RoutingConfig(capacity=each) for each in BUDGETS}}
"""The model for all budgets, and a model for each alone."""
TEMPLATE = "Q: {question}\nA: {answer}"


@dataclass(frozen=True)
class Options:
    """Trains every arm with every seed, one after the other; goes on where it stopped."""

    data: Path = Path("data")
    """Directory with gsm8k_train.jsonl and gsm8k_test.jsonl."""
    out: Path = Path("runs/any_budget")
    """Where the runs and the results are kept."""
    steps: int = 240
    """Optimizer steps of each run."""
    seeds: int = 3
    """Seeds per arm; a seed changes initialisation, order of the data, and which documents are held out."""
    questions: int = 192
    """Questions of GSM8K's test set that rules are compared on."""
    calibration_batches: int = 16
    """Held-out batches that thresholds are chosen on; the first half of them."""
    report: bool = False
    """Only measure and report, on the runs that there are."""


def config(options: Options, arm: str, seed: int) -> RunConfig:
    """One run: 4 layers of width 32, 2 of them routed; sequences of 256 BPE tokens."""
    return RunConfig(
        model=ModelConfig(width=32, layers=4, heads=2, context=256),
        routing=ARMS[arm],
        data=DataConfig(
            source=(str(options.data / "gsm8k_train.jsonl"),),
            template=TEMPLATE,
            tokenizer=str(options.out / "tokenizer.json"),
            seed=seed,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=30),
        train=TrainConfig(
            steps=options.steps, batch_size=4, seed=seed, loss_chunk=256, log_every=20, eval_every=options.steps,
            eval_batches=32, checkpoint_every=80, keep_checkpoints=1,
        ),
    )  # fmt: skip


def make_tokenizer(options: Options) -> None:
    """A byte-level BPE of 512 tokens from the same text, once."""
    from mod_star.data import read_sources
    from mod_star.tokenization import train_bpe

    path = options.out / "tokenizer.json"
    if not path.exists():
        options.out.mkdir(parents=True, exist_ok=True)
        sources = read_sources(config(options, ANY, 0).data.source, TEMPLATE)
        train_bpe((text for source in sources for text in source if isinstance(text, str)), 512, path)


def main() -> None:
    """Trains, unless only the report is asked for, and reports."""
    options = tyro.cli(Options, prog="python -m experiments.any_budget")
    if not options.report:
        from mod_star.commands import keep_compiled_programs
        from mod_star.training.train import train

        make_tokenizer(options)
        keep_compiled_programs()
        for seed in range(options.seeds):
            for arm in ARMS:
                train(config(options, arm, seed), options.out / f"{arm}-{seed}")
    from experiments.any_budget.report import report

    report(options)

"""Dense, Mixture-of-Depths and the stochastic-routing control at equal training FLOPs, three seeds each.

    python -m experiments.mod_vs_dense             # trains what is missing, then reports
    python -m experiments.mod_vs_dense --report    # reports on what there is

`--out` holds the runs, and after the report results.json, results.md and curves.png. Two runs at a time, one CPU core
each, so their minutes are those of one core, whatever else it had to do; interrupted, the same command goes on.
README.md beside this file has the claim, the data and what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.support.workers import train_all
from mod_star.config import DataConfig, ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, TrainConfig

ARMS = {
    "dense": RoutingConfig(every=0),
    "mod": RoutingConfig(),
    "stochastic": RoutingConfig(selection="stochastic"),
}
TEMPLATE = "Q: {question}\nA: {answer}"


@dataclass(frozen=True)
class Options:
    """Trains every arm with every seed, several runs at a time with one core each; goes on where it stopped."""

    data: Path = Path("data")
    """Directory with gsm8k_train.jsonl and tinyshakespeare.txt."""
    out: Path = Path("runs/mod_vs_dense")
    """Where the runs, the table and the plot are kept."""
    flops: float = 3e13
    """Training budget of each run in floating-point operations."""
    seeds: int = 3
    """Seeds per arm; a seed changes initialisation, order of the data, and which documents are held out."""
    workers: int = 2
    """Runs at a time, one core each."""
    learning_rate: float = 3e-3
    """Peak learning rate of all arms."""
    report: bool = False
    """Only report, on the runs that there are."""


def config(options: Options, arm: str, seed: int) -> RunConfig:
    """One run: 8 layers of width 128, sequences of 256 BPE tokens."""
    return RunConfig(
        model=ModelConfig(width=128, layers=8, heads=4, context=256),
        routing=ARMS[arm],
        data=DataConfig(
            source=(str(options.data / "gsm8k_train.jsonl"), str(options.data / "tinyshakespeare.txt")),
            weights=(0.97, 0.03),
            template=TEMPLATE,
            tokenizer=str(options.out / "tokenizer.json"),
            seed=seed,
        ),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate, warmup_steps=100),
        train=TrainConfig(
            flops=options.flops,
            batch_size=8,
            seed=seed,
            loss_chunk=256,
            log_every=20,
            eval_every=400,
            eval_batches=24,
            checkpoint_every=500,
            keep_checkpoints=1,
        ),
    )


def make_tokenizer(options: Options) -> None:
    """A byte-level BPE of 2,048 tokens from the same text, once."""
    from mod_star.data import read_sources
    from mod_star.tokenization import train_bpe

    path = options.out / "tokenizer.json"
    if not path.exists():
        data = config(options, "dense", 0).data
        options.out.mkdir(parents=True, exist_ok=True)
        texts = (text for source in read_sources(data.source, TEMPLATE) for text in source if isinstance(text, str))
        train_bpe(texts, 2048, path)


def main() -> None:
    """Trains, unless only the report is asked for, and reports."""
    options = tyro.cli(Options, prog="python -m experiments.mod_vs_dense")
    if not options.report:
        make_tokenizer(options)
        runs = {f"{arm}-{seed}": config(options, arm, seed) for seed in range(options.seeds) for arm in ARMS}
        train_all(runs, options.out, options.workers)
    from experiments.mod_vs_dense.report import report

    report(options.out, list(ARMS), options.seeds)

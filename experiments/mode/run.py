"""Dense, MoD, experts, experts that drop tokens, staged and integrated MoDE at equal FLOPs per token and equal steps.

    python -m experiments.mode             # trains what is missing, then reports
    python -m experiments.mode --report    # reports on what there is

`--out` holds the runs. One run at a time; interrupted, the same command goes on. README.md beside this file has the
claim, the data and what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mod_star.config import DataConfig, ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, TrainConfig

DROPPING = f"{Path(__file__).with_name('dropping.py')}:parts"
DEPTH = {"every": 2, "capacity": 1 / 3}
"""Of six blocks three compute a third of the tokens: the FLOPs of four."""
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "MoD": {"routing": DEPTH, "layers": 6},
    "MoE": {"experts": 8},
    "MoE, tokens dropped": {"parts": DROPPING},
    "staged MoDE": {"routing": DEPTH, "layers": 6, "experts": 8},
    "integrated MoDE": {"experts": 8, "experts_null": 4, "experts_width": 192},
}
"""What each has besides the dense model. Experts of width 128, two of them active, cost as much as one layer of 256; of
two choices among 8 experts and 4 null ones two thirds compute, and experts with 2/3 of their slots take two thirds."""


@dataclass(frozen=True)
class Options:
    """Trains every arm with every seed, one after the other; goes on where it stopped."""

    data: Path = Path("data")
    """Directory with tinyshakespeare.txt."""
    out: Path = Path("runs/mode")
    """Where the runs and the tables are kept."""
    steps: int = 1000
    """Optimizer steps of each run."""
    seeds: int = 3
    """Seeds per arm; a seed changes initialisation, order of the data, and which documents are held out."""
    report: bool = False
    """Only report, on the runs that there are."""


def config(options: Options, arm: str, seed: int) -> RunConfig:
    """One run: 4 layers of width 64, or 6 of which 3 are routed; sequences of 128 bytes."""
    fields = dict(ARMS[arm])
    routing, parts = RoutingConfig(**fields.pop("routing", {"every": 0})), fields.pop("parts", None)
    return RunConfig(
        model=ModelConfig(**{"width": 64, "layers": 4, "heads": 4, "mlp_width": 256, "context": 128} | fields),
        routing=routing,
        data=DataConfig(source=(str(options.data / "tinyshakespeare.txt"),), held_out=0.1, seed=seed),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
        train=TrainConfig(
            steps=options.steps, batch_size=8, seed=seed, loss_chunk=128, log_every=20, eval_every=250,
            eval_batches=16, checkpoint_every=100, keep_checkpoints=1,
        ),
        parts=parts,
    )  # fmt: skip


def name_of(arm: str, seed: int) -> str:
    """The directory of a run."""
    return f"{arm.replace(' ', '-').replace(',', '')}-{seed}"


def main() -> None:
    """Trains, unless only the report is asked for, and reports."""
    options = tyro.cli(Options, prog="python -m experiments.mode")
    if not options.report:
        from mod_star.training.train import train

        for seed in range(options.seeds):
            for arm in ARMS:
                train(config(options, arm, seed), options.out / name_of(arm, seed))
    from experiments.mode.report import report

    report(options)

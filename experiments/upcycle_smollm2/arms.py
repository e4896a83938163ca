"""What `experiments.upcycle_smollm2` trains: its options, its arms, and where their runs lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Upcycles and trains what is missing, arm by arm, and reports. Interrupted, the same command goes on."""

    model: Path = Path("runs/smollm2")
    """The dense model: a run, or what mod-star import reads (a GGUF file, a Hugging Face directory)."""
    data: Path = Path("data")
    """Directory with gsm8k_train.jsonl."""
    out: Path = Path("runs/upcycle_smollm2")
    """Where runs, tables and plot are kept."""
    capacities: tuple[float, ...] = (0.5, 0.125)
    """Capacities of the Mixture-of-Depths arms. The last is also trained without stages."""
    dense_steps: int = 80
    """The budget of every arm, in steps of the dense model."""
    batch_size: int = 2
    """Sequences per step."""
    context: int = 256
    """Tokens per sequence."""
    learning_rate: float = 3e-4
    """Peak learning rate of all arms; cosine to a tenth after ten steps of warm-up."""
    eval_batches: int = 8
    """Batches of a held-out evaluation."""
    seed: int = 0
    """Seed of the data's order and split, and of the predictors."""
    keep_models: bool = False
    """Keep the trained parameters and optimizer states, 1.6 GB per arm."""
    report: bool = False
    """Only report, on what there is."""


@dataclass(frozen=True)
class Arm:
    """One way to spend the budget."""

    name: str
    capacity: float | None
    """None: dense."""
    staged: bool = True


def arms(options: Options) -> list[Arm]:
    """Dense, each capacity in stages, the last one at once."""
    staged = [Arm(f"MoD {capacity:.4g}", capacity) for capacity in options.capacities]
    return [Arm("dense", None), *staged, replace(staged[-1], name=f"{staged[-1].name} at once", staged=False)]


def directory(options: Options, arm: Arm) -> Path:
    """Where an arm's run is kept."""
    return options.out / f"{arm.name.replace(' ', '_')}-{options.seed}"

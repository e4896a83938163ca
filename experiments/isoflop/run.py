"""Dense against Mixture-of-Depths at equal FLOPs per forward pass and equal steps: loss over parameters, per budget.

    python -m experiments.isoflop             # trains what is missing, then reports
    python -m experiments.isoflop --report    # reports on what there is

`--out` holds the runs, and after the report results.md and losses.png. Interrupted, the same command goes on. Runs come
seed by seed, so that the first seed's picture is complete first. README.md beside this file has the claim, the data and
what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console

from experiments.support.workers import train_all
from mod_star.config import DataConfig, ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.errors import require

TEMPLATE = "Q: {question}\nA: {answer}"
VOCAB = 2048
DENSE, MOD = RoutingConfig(every=0), RoutingConfig()


@dataclass(frozen=True)
class Arm:
    """One kind of model."""

    layers: int = 14
    """Blocks. 14, every second of which is routed, cost what 8 full ones do."""
    routing: RoutingConfig = MOD
    parts: str | None = None
    same_steps: bool = True
    """Whether it takes as many steps as the dense model of its width, or as many as cost the same."""


ARMS: dict[str, Arm] = {
    "dense": Arm(8, DENSE),
    "MoD": Arm(),
    "stages": Arm(routing=replace(MOD, stages=(1.0, 0.5, 0.25), stage_fraction=0.35), same_steps=False),
    "norm router": Arm(parts=f"{Path(__file__).with_name('norm_router.py')}:parts"),
    "stochastic": Arm(routing=replace(MOD, selection="stochastic")),
    "full blocks alone": Arm(7, DENSE, same_steps=False),
}
SWEPT = ("dense", "MoD")
"""The arms that are trained at every width; the others at the middle one."""


@dataclass(frozen=True)
class Options:
    """Trains every arm at every budget with every seed; goes on where it stopped."""

    data: Path = Path("data")
    """Directory with gsm8k_train.jsonl and tinyshakespeare.txt."""
    out: Path = Path("runs/isoflop")
    """Where runs, tables and the picture are kept."""
    budgets: tuple[float, ...] = (1e11, 2e11, 4e11)
    """Training budgets of a run in floating-point operations: multiples of the smallest. One run is read at all."""
    widths: tuple[int, ...] = (8, 16, 24, 32, 48)
    """Widths of the models; they have one head, or a head per 16."""
    middle: int = 32
    """The width at which the arms other than dense and MoD are trained."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A seed changes the initialisation, the order of the data, and which documents are held out."""
    batch_size: int = 2
    """Sequences of 256 tokens in a batch."""
    learning_rate: float = 3e-3
    """Of all arms, constant after warm-up, so that a run can be read at any number of steps."""
    workers: int = 1
    """Runs at a time, one core each. 1 where there is one accelerator."""
    report: bool = False
    """Only report, on the runs that there are."""

    @property
    def multiples(self) -> dict[int, float]:
        """The budgets by how many times the smallest one they are, ascending.

        Raises:
          InputError: there are none, or one is not a multiple.
        """
        require(len(self.budgets) > 0 and min(self.budgets) > 0, "--budgets", self.budgets, "must be above 0")
        first = min(self.budgets)
        for budget in self.budgets:
            allowed = f"must be a multiple of the smallest, {first:.3g}"
            require(abs(budget / first - round(budget / first)) < 1e-6, "--budgets", budget, allowed)
        return {round(budget / first): budget for budget in sorted(self.budgets)}


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    arm: str
    width: int
    seed: int

    @property
    def name(self) -> str:
        """Its directory."""
        return f"{self.arm.replace(' ', '_')}-{self.width}-{self.seed}"


def cells(options: Options) -> Iterator[Cell]:
    """All runs in the order in which they are trained: of each seed the middle width with all arms comes first."""
    require(options.middle in options.widths, "--middle", options.middle, f"must be one of --widths {options.widths}")
    for seed in options.seeds:
        for width in sorted(options.widths, key=lambda width: width != options.middle):
            for arm in ARMS if width == options.middle else SWEPT:
                yield Cell(arm, width, seed)


def config(options: Options, cell: Cell) -> RunConfig:
    """One run to the largest budget, evaluated at every multiple of the smallest (with stages: at the end alone).

    Raises:
      InputError: the smallest budget does not reach for one step.
    """
    from mod_star.flops import training_step_flops  # imports JAX, which a worker may only after it has its core

    arm, run = ARMS[cell.arm], _config(options, cell)
    dense_step = training_step_flops(_config(options, replace(cell, arm="dense")))
    last = max(options.multiples)
    first = options.multiples[1]
    steps = int(first // dense_step)
    allowed = f"must be at least one step's, {dense_step:.3g} at width {cell.width}"
    require(steps >= 1, "--budgets", first, allowed)
    if run.routing.stages:  # whose share of the steps is of a whole run
        train = replace(run.train, flops=last * steps * dense_step, eval_every=0)
    else:
        own = steps if arm.same_steps else int(steps * dense_step // training_step_flops(run))
        train = replace(run.train, steps=last * own, eval_every=own)
    return replace(run, train=train)


def _config(options: Options, cell: Cell) -> RunConfig:
    arm, width = ARMS[cell.arm], cell.width
    heads = 1 if width % 16 else width // 16
    return RunConfig(
        model=ModelConfig(vocab_size=VOCAB, width=width, layers=arm.layers, heads=heads, mlp_width=3 * width),
        routing=arm.routing,
        data=DataConfig(
            source=(str(options.data / "gsm8k_train.jsonl"), str(options.data / "tinyshakespeare.txt")),
            weights=(0.97, 0.03),
            template=TEMPLATE,
            tokenizer=str(options.out / "tokenizer.json"),
            seed=cell.seed,
        ),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate, schedule="constant", warmup_steps=40),
        train=TrainConfig(
            batch_size=options.batch_size, seed=cell.seed, loss_chunk=256, log_every=20, eval_batches=24,
            checkpoint_every=500, keep_checkpoints=1,
        ),
        parts=arm.parts,
    )  # fmt: skip


def make_tokenizer(options: Options) -> None:
    """A byte-level BPE of 2,048 tokens from the same text, once."""
    from mod_star.data import read_sources
    from mod_star.tokenization import train_bpe

    path = options.out / "tokenizer.json"
    if not path.exists():
        source = _config(options, Cell("dense", options.middle, 0)).data.source
        options.out.mkdir(parents=True, exist_ok=True)
        texts = (text for each in read_sources(source, TEMPLATE) for text in each if isinstance(text, str))
        train_bpe(texts, VOCAB, path)


def main() -> None:
    """Trains, unless only the report is asked for, and reports."""
    options = tyro.cli(Options, prog="python -m experiments.isoflop")
    if not options.report:
        runs = {cell.name: config(options, cell) for cell in cells(options)}
        make_tokenizer(options)
        train_all(runs, options.out, options.workers)
    from experiments.isoflop.report import report

    report(options, Console(highlight=False, soft_wrap=True))

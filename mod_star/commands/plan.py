"""`mod-star plan`: what a training step takes of a machine that is not there."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mod_star.commands import parse_options
from mod_star.config import MeshConfig, RunConfig
from mod_star.errors import InputError
from mod_star.planning.topologies import parse_topology, prepare_environment
from mod_star.presets import PRESETS
from mod_star.runs.stored_config import is_run, read_config

if TYPE_CHECKING:
    from rich.console import Console

    from mod_star.planning.plan_training import Watch

WHAT = "the name of a preset, or the directory of a run"


@dataclass(frozen=True)
class PlanOptions:
    """Compiles the training step of PRESET (or of the run in that directory) for a machine that is not there.

    Examples:
      mod-star plan 7b-mod --topology v5e:16x16 --mesh.fsdp 256
      mod-star plan 7b --topology v5p:4x4x4 --batch 256 --mesh.fsdp 16 --mesh.tensor 4
      mod-star plan base --topology h100:8 --mesh.fsdp 8
      mod-star plan tiny --topology cpu:4 --json

    Shows memory by kind against what a chip has, FLOPs, communication, and how long a step takes at least. For TPU
    slices it needs jax[tpu], but no TPU. GPUs are lowered for, not compiled for, which leaves some of it unknown. cpu:N
    compiles for N stand-ins on this machine, and needs nothing. A 7B model takes minutes and some GB of memory here.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """tiny, small, base, 7b, 7b-mod, 7b-quiet, or the directory of a run."""
    config: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    """What to change about it."""
    topology: str
    """TPU slice (v5e:16x16, v5p:4x4x4, v4:2x2x1, v6e:8x8), GPUs (h100:8, h200:8, a100:8) or stand-ins (cpu:8)."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How its chips are arranged."""
    batch: int | None = None
    """Sequences per step; short for --train.batch-size."""
    json: bool = False
    """Print one JSON object."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    source, config = _source(argv)
    start = PlanOptions(source=tyro.MISSING, config=config, topology=tyro.MISSING)
    options = parse_options(PlanOptions, argv, "mod-star plan", start)
    if options.source != source:
        raise InputError(f"PRESET = {options.source!r}: must be {WHAT} ({', '.join(PRESETS)})")
    topology = parse_topology(options.topology)
    config = options.config
    if options.batch is not None:
        config = replace(config, train=replace(config.train, batch_size=options.batch))
    prepare_environment()  # before JAX is imported, which the next lines do

    from rich.console import Console

    from mod_star.planning.plan_training import plan_training
    from mod_star.views.plan import plan_record, plan_report

    with _watching(Console(stderr=True)) as watch:
        plan = plan_training(config, topology, options.mesh, watch)
    if options.json:
        print(json.dumps(plan_record(plan, options.source)))
    else:
        Console(highlight=False).print(plan_report(plan, options.source))


@contextmanager
def _watching(console: Console) -> Iterator[Watch]:
    """Shows what is being done and for how long, in a terminal; elsewhere nothing."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        @contextmanager
        def watch(what: str) -> Iterator[None]:
            task = progress.add_task(what, total=None)
            yield
            progress.remove_task(task)

        yield watch


def _source(argv: Sequence[str]) -> tuple[str | None, RunConfig]:
    """The positional argument, which the other options' defaults depend on, and its configuration.

    Which word it is can't be told for certain without knowing all options: it is one that names a preset or a run, and
    rather one that no option stands before.
    """
    named = [
        (word, previous.startswith("-") and "=" not in previous)
        for previous, word in itertools.pairwise(["", *argv])
        if word in PRESETS or (not word.startswith("-") and is_run(Path(word)))
    ]
    if not named:
        return None, RunConfig()
    word = min(named, key=lambda entry: entry[1])[0]
    return word, PRESETS[word]() if word in PRESETS else read_config(Path(word))

"""A pretrained dense model becomes a Mixture-of-Depths model: SmolLM2-135M on GSM8K text at equal training FLOPs.

    python -m experiments.upcycle_smollm2 --model SmolLM2-135M-Instruct.gguf    # trains what is missing, then reports
    python -m experiments.upcycle_smollm2 --report                              # reports on what there is

Every arm starts from the same weights and is trained on the same text for the FLOPs of `--dense-steps` steps of the
dense model: dense, and upcycled with every second block routed to each of `--capacities`, which training reaches by way
of 1, 1/2, ... in its first half (`mod-star upcycle`). "at once" has no such stages. Held-out loss is measured with the
same documents before training and after each sixth of the steps, which is where the stages of 0.125 end; routed by
top-k, as trained, and causally, as sampled. `--out` holds the runs, results.json, results.md and the plot. One seed on
one CPU core; interrupted, the same command goes on.

Measured (AMD EPYC, one core each, JAX 0.10.2; 77 minutes of training; held-out nats per token, top-k / causal):

    before training     dense 2.242; capacity 1 the same; cut to 0.5 at once 7.393 / 4.816, to 0.125 11.21 / 10.68
    after 35 TFLOP      dense 1.624; MoD 0.5 3.602 / 3.296; MoD 0.125 3.044 / 3.891; 0.125 at once 2.907 / 4.643

A negative result: in so short a training routed blocks do not recover, and stages help the causal loss only. At the end
of the first stage MoD equals dense (1.723 against 1.733); what is lost is lost when half of the tokens are taken from a
block before the router knows which. Routers start at zero, so that capacity 1 changes nothing, and learn slowly through
a gate of 1 + 0.2 tanh; the predictor is right in 50 % (0.5) and 12.5 % (0.125) of its decisions, and "at once" in
87.5 % only by never choosing.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.reporting import write_aside
from mod_star.config import DataConfig, OptimizerConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.data import held_out_batches
from mod_star.errors import InputError
from mod_star.flops import training_step_flops
from mod_star.model import Decoder
from mod_star.pretrained.upcycle import upcycle
from mod_star.runs.checkpoints import saved_steps
from mod_star.runs.directory import LoadedRun, load_run
from mod_star.runs.stored_config import is_run, read_config
from mod_star.stages import plan_stages
from mod_star.training.objectives.next_token import make_eval_step, summarise_eval
from mod_star.training.train import SUMMARY_FILE, train

TEMPLATE = "Q: {question}\nA: {answer}"
POINTS = 6
"""Evaluations per run, after equal parts of its steps."""


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


def dense_run(options: Options) -> Path:
    """Directory of the dense model's run; imports it, if it isn't one."""
    if is_run(options.model):
        return options.model
    path = options.out / "imported"
    if not is_run(path):
        from mod_star.pretrained.importing import import_model, open_source

        options.out.mkdir(parents=True, exist_ok=True)
        import_model(open_source(str(options.model)), path, context=options.context)
    return path


def start_of(options: Options, arm: Arm) -> Path:
    """Directory of the run that an arm starts from."""
    base = dense_run(options)
    if arm.capacity is None:
        return base
    path = options.out / f"upcycled-{arm.capacity:.4g}"
    if not is_run(path):
        upcycle(base, path, arm.capacity)
    return path


def configure(options: Options, base: RunConfig, routing: RoutingConfig) -> RunConfig:
    """The run of an arm, from the configuration of what it starts from."""
    run = replace(
        base,
        model=replace(base.model, context=options.context),
        routing=routing,
        data=DataConfig(
            source=(str(options.data / "gsm8k_train.jsonl"),),
            template=TEMPLATE,
            tokenizer=base.data.tokenizer,
            seed=options.seed,
        ),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate, warmup_steps=10, weight_decay=0.01),
        train=TrainConfig(
            batch_size=options.batch_size,
            seed=options.seed,
            loss_chunk=options.context,
            log_every=2,
            eval_every=0,
            eval_batches=options.eval_batches,
            keep_checkpoints=1,
        ),
    )
    dense = replace(run, routing=replace(routing, every=0, stages=()))
    budget = options.dense_steps * training_step_flops(dense)
    run = replace(run, train=replace(run.train, flops=budget))
    part = max(1, plan_stages(run).steps // POINTS)  # rounded down: just before the capacity falls, not just after
    return replace(run, train=replace(run.train, eval_every=part, checkpoint_every=2 * part))


def arm_run(options: Options, arm: Arm) -> RunConfig:
    """The configuration of an arm's run."""
    start = start_of(options, arm)
    base = read_config(start)
    routing = base.routing if arm.staged else replace(base.routing, stages=())
    return replace(configure(options, base, routing), init_from=str(start))


def held_out_loss(loaded: LoadedRun, run: RunConfig) -> dict[str, Any]:
    """Held-out metrics of a model before it is trained as `run` says, with the batches that its training will use."""
    batches = held_out_batches(run.data, loaded.tokenizer, run.model.context, run.train.batch_size)
    step = jax.jit(make_eval_step(Decoder(run.model, run.routing), run))
    sums = [
        jax.device_get(step(loaded.params, batch, jax.random.key(0)))
        for batch in itertools.islice(batches, run.train.eval_batches)
    ]
    return summarise_eval(jax.tree.map(lambda *values: np.sum(np.asarray(values, np.float64), axis=0), *sums))


def measure_before(options: Options) -> dict[str, Any]:
    """Held-out loss of untrained models: dense, upcycled at capacity 1, cut to each capacity; kept in a file."""
    path = options.out / f"before-{options.seed}.json"
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    found = {}
    for name, start, routing in _before(options):
        loaded = load_run(start)
        run = configure(options, read_config(start), loaded.config.routing if routing is None else routing)
        found[name] = held_out_loss(loaded, run)
        print(f"{name}: {found[name]}", flush=True)
    write_aside(path, (json.dumps(found, indent=2) + "\n").encode())
    return found


def _before(options: Options) -> Iterator[tuple[str, Path, RoutingConfig | None]]:
    """Name, run and routing of what is measured before training."""
    yield "dense", dense_run(options), None
    for arm in arms(options):
        if arm.capacity is not None and arm.staged:
            start = start_of(options, arm)
            routing = replace(read_config(start).routing, stages=())
            if arm.capacity == options.capacities[0]:
                yield "MoD 1", start, replace(routing, capacity=1.0)
            yield arm.name, start, routing


def train_arm(options: Options, arm: Arm) -> None:
    """Trains one arm to its end, or goes on with it."""
    path = directory(options, arm)
    if not (path / SUMMARY_FILE).is_file():
        train(arm_run(options, arm), path)
    if not options.keep_models:
        for step in saved_steps(path / "checkpoints"):
            shutil.rmtree(path / "checkpoints" / str(step))


def main() -> None:
    """Measures and trains what is missing, and reports."""
    options = tyro.cli(Options)
    from experiments.upcycle_smollm2_report import report

    try:
        if not options.report:
            options.out.mkdir(parents=True, exist_ok=True)
            measure_before(options)
            for arm in arms(options):
                train_arm(options, arm)
                report(options)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    if options.report:
        report(options)


if __name__ == "__main__":
    main()

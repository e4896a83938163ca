"""A pretrained dense model becomes a Mixture-of-Depths model: SmolLM2-135M on GSM8K text at equal training FLOPs.

    python -m experiments.upcycle_smollm2 --model SmolLM2-135M-Instruct.gguf    # trains what is missing, then reports
    python -m experiments.upcycle_smollm2 --report                              # reports on what there is

Every arm starts from the same weights and is trained on the same text for the FLOPs of `--dense-steps` steps of the
dense model: dense, and upcycled with every second block routed to each of `--capacities`, which training reaches by way
of 1, 1/2, ... in its first half (`mod-star upcycle`). "at once" has no such stages. Held-out loss is measured with the
same documents before training and after each sixth of the steps, which is where the stages of 0.125 end; routed by
top-k, as trained, and causally, as sampled. `--out` holds the runs, results.json, results.md and the plot. README.md
beside this file has what was measured.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.support.reporting import write_aside
from experiments.upcycle_smollm2.arms import Arm, Options, arms, directory
from experiments.upcycle_smollm2.report import report
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
    losses = {}
    for name, start, routing in _before(options):
        loaded = load_run(start)
        run = configure(options, read_config(start), loaded.config.routing if routing is None else routing)
        losses[name] = held_out_loss(loaded, run)
        print(f"{name}: {losses[name]}", flush=True)
    write_aside(path, (json.dumps(losses, indent=2) + "\n").encode())
    return losses


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
    options = tyro.cli(Options, prog="python -m experiments.upcycle_smollm2")
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

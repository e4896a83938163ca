"""Does the router find the tokens that need compute? A few symbols that need sequential steps, among filler.

    python -m experiments.depth_where_needed             # trains what is missing, then reports
    python -m experiments.depth_where_needed --report    # reports on what there is

`--out` holds one JSON file per arm and seed, and after the report results.md and accuracy.png. Interrupted, the same
command goes on with the arm and seed it was at. README.md beside this file has the task and what was measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.depth_where_needed.report import file_name, report
from experiments.depth_where_needed.task import VOCAB, context_of, make_batch
from experiments.support.reporting import write_aside
from mod_star.commands import keep_compiled_programs
from mod_star.config import ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.flops import training_step_flops
from mod_star.model import Decoder
from mod_star.model.cross_entropy import cross_entropy
from mod_star.model.parts import Part, Parts
from mod_star.model.routing import RoutingMode
from mod_star.model.transformer import head_matrix, logits_of
from mod_star.stages import StagePlan, plan_stages
from mod_star.training.objectives.next_token import forward
from mod_star.training.state import init_state
from mod_star.training.step import make_train_step

LAYERS = 4
DENSE, MOD = RoutingConfig(every=0), RoutingConfig(capacity=0.125)
NORM = Parts(router=Part(lambda key, config: {}, lambda params, x_SxD: jnp.linalg.norm(x_SxD, axis=-1)))
"""The router that has nothing to learn: the norm of the stream."""


@dataclass(frozen=True)
class Arm:
    """One kind of model, and how its routers learn."""

    routing: RoutingConfig = MOD
    layers: int = LAYERS
    parts: Parts = field(default_factory=Parts)
    explores: bool = False
    """Whether noise and explore fall to 0 in the first half of the steps."""


ARMS: dict[str, Arm] = {
    "dense deep": Arm(DENSE),
    "dense shallow": Arm(DENSE, LAYERS // 2),
    "MoD": Arm(),
    "stages": Arm(replace(MOD, stages=(1.0, 0.5, 0.25), stage_fraction=0.35)),
    "long stages": Arm(replace(MOD, stages=(1.0, 0.5, 0.25), stage_fraction=0.7)),
    "noise": Arm(replace(MOD, noise=1.0), explores=True),
    "explore": Arm(replace(MOD, explore=0.5), explores=True),
    "stages, explore": Arm(replace(MOD, stages=(1.0, 0.5, 0.25), stage_fraction=0.35, explore=0.5), explores=True),
    "tanh gate": Arm(replace(MOD, gate="tanh")),
    "norm router": Arm(parts=NORM),
    "stochastic": Arm(replace(MOD, selection="stochastic")),
}


@dataclass(frozen=True)
class Options:
    """Trains every arm with every seed at the same number of operations. Interrupted, the same command goes on."""

    out: Path = Path("runs/depth_where_needed")
    """Where results, tables and the picture are kept."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A seed changes initialisation, lines and draws."""
    arms: tuple[str, ...] = field(default_factory=lambda: tuple(ARMS))
    """Which arms."""
    operations: int = 7
    """Of a line: the most steps of work. A sequence has eight times as many symbols, and eight more."""
    sequences: int = 8
    """In a batch."""
    steps: int = 400
    """Steps of the dense deep model; the others get as many as cost the same."""
    learning_rate: float = 3e-3
    """Constant after warm-up, so that an arm can be read at any number of steps."""
    report: bool = False
    """Only report, on what there is."""


def run_of(options: Options, arm: Arm, seed: int, steps: int) -> RunConfig:
    """An arm's run of some steps."""
    context = context_of(options.operations)
    routing = replace(arm.routing, explore_steps=steps // 2) if arm.explores else arm.routing
    return RunConfig(
        ModelConfig(vocab_size=VOCAB, width=64, layers=arm.layers, heads=4, context=context),
        routing,
        optimizer=OptimizerConfig(
            learning_rate=options.learning_rate, schedule="constant", warmup_steps=50, weight_decay=0.01
        ),
        train=TrainConfig(steps=steps, batch_size=options.sequences, loss_chunk=context, seed=seed),
    )


def plan_of(options: Options, arm: Arm, seed: int) -> tuple[RunConfig, StagePlan]:
    """The run of as many steps as cost what those of the dense deep model do, and its stages."""
    dense = ARMS["dense deep"]
    budget = options.steps * training_step_flops(run_of(options, dense, seed, options.steps))
    run = run_of(options, arm, seed, options.steps)
    plan = plan_stages(replace(run, train=replace(run.train, flops=budget)))
    run = run_of(options, arm, seed, plan.steps)
    return run, plan_stages(run)


def teach(options: Options, name: str, seed: int, console: Console) -> None:
    """Trains one arm, and writes down what it can do at points of its training."""
    path = options.out / f"{file_name(name)}-{seed}.json"
    if path.exists():
        return
    arm = ARMS[name]
    run, plan = plan_of(options, arm, seed)
    own = Decoder(run.model, plan.stages[-1].run.routing, arm.parts)
    state = init_state(own, plan.stages[-1].run, plan.steps)
    programs = [
        jax.jit(
            make_train_step(Decoder(run.model, stage.run.routing, arm.parts), stage.run, plan.steps), donate_argnums=0
        )
        for stage in plan.stages
    ]
    evaluate = make_evaluation(own)
    held_out = make_batch(np.random.default_rng(999), 256, options.operations)
    rng = np.random.default_rng(seed + 1)
    # Also the steps at which the dense deep model is read, so that arms can be compared at equal steps.
    points = {round(plan.steps * i / 5) for i in range(1, 6)} | {options.steps}
    curve, began = [], time.process_time()
    for step in range(1, plan.steps + 1):
        batch, _ = make_batch(rng, options.sequences, options.operations)
        state, _ = programs[plan.stages.index(plan.at(step))](state, batch)
        if step in points:
            measured = evaluate(state.params, *held_out)
            curve.append({"step": step, "flops": plan.flops_until(step), **measured})
            console.print(f"{time.strftime('%H:%M:%S')} {name}, seed {seed}, step {step} of {plan.steps}: {measured}")
    result = {"arm": name, "seed": seed, "steps": plan.steps, "seconds": time.process_time() - began, "curve": curve}
    write_aside(path, (json.dumps(result) + "\n").encode())


def make_evaluation(decoder: Decoder) -> Callable[..., dict[str, Any]]:
    """`(params, batch, work) -> measures` under both routings.

    right: share of right answers after 1, 2, ... steps of work. loss: nats per hard symbol. hard_routed: share of the
    hard symbols that each routed block computes; routed: of all symbols.
    """
    modes: tuple[RoutingMode, ...] = ("top_k", "causal") if decoder.routing.every else ("top_k",)

    @jax.jit
    def look(params: Any, batch: Any, hard: jax.Array) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for mode in modes:
            output = forward(decoder, params, batch, jax.random.key(5), mode)
            logits = jax.vmap(lambda h: logits_of(params, h))(output.hidden)
            weights = hard.astype(jnp.float32)
            loss = cross_entropy(output.hidden, head_matrix(params), batch["targets"], weights, hard.shape[1])
            selected = () if output.trace is None else output.trace.selected
            seen[mode] = jnp.argmax(logits, -1) == batch["targets"], loss / weights.sum(), selected
        return seen

    def evaluate(params: Any, batch: Any, work: Any) -> dict[str, Any]:
        measured: dict[str, Any] = {}
        hard = work >= 0
        for mode, (right, loss, selected) in jax.device_get(look(params, batch, jnp.asarray(work > 0))).items():
            by_work = [round(float(right[work == h].mean()), 4) for h in range(1, work.max() + 1)]
            measured[mode] = {"right": by_work, "loss": round(float(loss), 5)}
            if decoder.routing.every:
                by_group = np.moveaxis(selected, 1, 0)  # groups first
                measured[mode]["hard_routed"] = [round(float(each[hard].mean()), 4) for each in by_group]
                measured[mode]["routed"] = [round(float(each.mean()), 4) for each in by_group]
        return measured

    return evaluate


def main() -> None:
    """Trains what is missing, seed by seed, and reports."""
    options = tyro.cli(Options, prog="python -m experiments.depth_where_needed")
    console = Console(highlight=False, soft_wrap=True)
    if not options.report:
        keep_compiled_programs()
        for seed in options.seeds:
            for name in options.arms:
                teach(options, name, seed, console)
    report(options.out, tuple(ARMS), console)

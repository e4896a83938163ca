"""A training step against a plain PyTorch trainer of the same model, on the machine it runs on.

    python -m experiments.benchmarks.peers --torch-python ~/torch/bin/python           # a table
    python -m experiments.benchmarks.peers --torch-python ~/torch/bin/python --json    # one flat JSON object

The peer is `experiments/benchmarks/peers_torch.py`: width 512, 8 layers, vocabulary 4,096, float32, eager, causal
`scaled_dot_product_attention`, fused AdamW; dense, and with the same Mixture-of-Depths. The sides take turns, warm; a
ratio is one of medians. torch is no dependency: any interpreter that has it serves (--torch-python or $TORCH_PYTHON).
Takes about three minutes on two CPU cores; nothing else should run beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tyro
from rich.console import Console

from experiments.support.timing import in_turns
from experiments.support.training_steps import compiled_step
from mod_star.config import ModelConfig, RoutingConfig, RunConfig, TrainConfig
from mod_star.errors import InputError
from mod_star.views.terminal import result_table

SHAPES = {"s256": (256, 8, 7), "s1024": (1024, 4, 5)}
"""Context, batch, rounds."""
ARMS = {"dense": RoutingConfig(every=0), "mod": RoutingConfig(every=2, capacity=0.125, predictor_width=128)}


class Torch:
    """The peer in a process of its own; a context manager."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("peers_torch.py")
        try:
            self._process = subprocess.Popen([python, str(script)], stdin=-1, stdout=-1, text=True)
        except OSError as error:
            raise InputError(f"--torch-python = {python!r}: cannot be run: {error.strerror}") from error
        self._python = python

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._process:  # closes its input, with which it ends, and waits
            pass

    def step(self, routed: bool, context: int, batch: int) -> float:
        """Seconds of one training step, as the peer measures them."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = json.dumps({"routed": routed, "context": context, "batch": batch})
        with contextlib.suppress(BrokenPipeError):
            print(request, file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise InputError(f"--torch-python = {self._python!r}: must be a Python that can import torch")
        return float(json.loads(line)["seconds"])


def our_step(routing: RoutingConfig, context: int, batch: int) -> Any:
    """A function that does one training step, compiled."""
    model = ModelConfig(vocab_size=4096, width=512, heads=8, layers=8, mlp_width=1408, context=context)
    run = RunConfig(model=model, routing=routing, train=TrainConfig(batch_size=batch))
    return compiled_step(run)[0]


def measure(python: str) -> dict[str, float]:
    """Seconds of each side's steps, and their ratios."""
    with Torch(python) as torch:
        return _measure(torch)


def _measure(torch: Torch) -> dict[str, float]:
    results: dict[str, float] = {}
    for shape, (context, batch, rounds) in SHAPES.items():
        functions: dict[str, Any] = {}
        for arm, routing in ARMS.items():
            functions[arm] = our_step(routing, context, batch)
            functions[f"torch_{arm}"] = lambda arm=arm, context=context, batch=batch: torch.step(
                arm == "mod", context, batch
            )
        times = in_turns(functions, rounds)
        results |= {f"{name}_seconds_{shape}": value for name, value in times.items()}
        for arm in ARMS:
            results[f"{arm}_over_torch_{shape}"] = times[arm] / times[f"torch_{arm}"]
    return results


@dataclass(frozen=True)
class Options:
    """Measures our training step against a plain PyTorch trainer's, in turns."""

    torch_python: str | None = None
    """An interpreter that can import torch. None: $TORCH_PYTHON, or else the one that runs this."""
    json: bool = False
    """Print one flat JSON object instead of a table."""


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options)
    try:
        results = measure(options.torch_python or os.environ.get("TORCH_PYTHON") or sys.executable)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    results = {name: float(f"{value:.4g}") for name, value in results.items()}
    if options.json:
        print(json.dumps(results))
    else:
        Console().print(result_table("Training steps against PyTorch", ["quantity", "value"], list(results.items())))


if __name__ == "__main__":
    main()

"""Checks and measures mod_star on the accelerator that is here: one command for a borrowed GPU or TPU.

    python -m experiments.benchmarks.on_accelerator --out results        # under 8 minutes on one chip
    python -m experiments.benchmarks.on_accelerator --out results --tiny # the same at tiny sizes, on a CPU too

First what must be true there: attention against NumPy in float64 (packed, windowed, routed, grouped; float32 and
bfloat16), documents that do not see each other, eight invariants of the network. Then seconds of a training step
(dense, Mixture-of-Depths, Quiet-STaR), its share of the chip's peak, memory, and generated tokens per second.

`results.json` in the directory is written after every line, and a command that is repeated goes on after it.
`table.txt` is what is printed at the end. What does not fit the memory, or fails, is a line of the table too. Exits
with 1 if a check failed.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.benchmarks import accelerator_checks as checks
from experiments.benchmarks import accelerator_speed
from mod_star.atomic_files import write_atomically
from mod_star.errors import InputError, require, writing
from mod_star.views.terminal import result_table

Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Checks and measures mod_star on the accelerator that is here."""

    out: Path
    """Directory of results.json and table.txt; made if need be."""
    tiny: bool = False
    """Tiny sizes: to try the command itself, on a CPU too."""
    minutes: float = 8.0
    """Begin nothing more after so many minutes (above 0). Repeat the command for what is left."""


def _check_record(check: checks.Check) -> Record:
    return {"passed": check.passed, "error": check.error, "allowed": check.allowed}


def tasks(tiny: bool) -> dict[str, Callable[[], Record]]:
    """Everything to do, by name, in order; each returns what is recorded of it."""
    sizes = checks.TINY if tiny else checks.FULL
    every: dict[str, Callable[[], Record]] = {}
    for dtype in ("float32", "bfloat16"):
        for name, case in checks.ATTENTION_CASES.items():
            every[f"attention equals NumPy: {name}, {dtype}"] = lambda case=case, dtype=dtype: _check_record(  # type: ignore[misc]
                checks.attention_equals_numpy(case, dtype, sizes)
            )
        every[f"documents do not see each other, {dtype}"] = lambda dtype=dtype: _check_record(  # type: ignore[misc]
            checks.documents_do_not_see_each_other(dtype, sizes)
        )
    for name, invariant in checks.INVARIANTS.items():
        every[name] = lambda invariant=invariant: _check_record(invariant(checks.make_network(sizes)))  # type: ignore[misc]
    return every | accelerator_speed.measurements(tiny)


def machine(tiny: bool) -> Record:
    """What results are of; those of another machine or of other sizes are not gone on with."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "host": platform.machine(),
        "jax": jax.__version__,
        "tiny": tiny,
    }


def earlier_results(path: Path, here: Record) -> dict[str, Record]:
    """What an earlier call recorded.

    Raises:
      InputError: the file can't be read, or is of another machine or of other sizes.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        was, results = content["machine"], dict(content["results"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as results of this command: {error}") from error
    require(was == here, f"{path}: machine", was, f"must be {here}; take another --out")
    return results


def outcome_of(task: Callable[[], Record]) -> Record:
    """What a task records; of one that fails, the first line of its error."""
    began = time.perf_counter()
    try:
        record = task()
    except Exception as error:  # out of memory, what a kernel refuses: results too
        lines = str(error).strip().splitlines() or [""]
        record = {"failed": f"{type(error).__name__}: {lines[0][:200]}"}
    return {**record, "wall_seconds": time.perf_counter() - began}


def table_of(results: dict[str, Record], title: str) -> Any:
    """A row for each result."""
    rows = []
    for name, record in results.items():
        if "failed" in record:
            rows.append((name, "failed", record["failed"]))
        elif "passed" in record:
            verdict = "passed" if record["passed"] else "WRONG"
            rows.append((name, verdict, f"error {record['error']:.3g}, allowed {record['allowed']:.3g}"))
        else:
            figures = (f"{key} {value:.4g}" for key, value in record.items() if value is not None)
            rows.append((name, "measured", ", ".join(figures)))
    return result_table(title, ["what", "outcome", "figures"], rows)


def run(options: Options) -> bool:
    """Does what is left to do, saves after each; whether no check is wrong and none failed.

    Raises:
      InputError: `minutes`, or earlier results that do not belong here.
    """
    require(options.minutes > 0, "--minutes", options.minutes, "must be above 0")
    began, here, path = time.perf_counter(), machine(options.tiny), options.out / "results.json"
    results = earlier_results(path, here)
    every = tasks(options.tiny)
    left = [name for name in every if name not in results]
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(every), completed=len(every) - len(left))
        for name in left:
            if time.perf_counter() - began > 60 * options.minutes:
                break
            progress.update(bar, description=name)
            results[name] = outcome_of(every[name])
            with writing(path):
                write_atomically(path, json.dumps({"machine": here, "results": results}, indent=1))
            progress.advance(bar)
    table = table_of(results, f"{here['device']}, JAX {here['jax']}")
    Console().print(table)
    with (options.out / "table.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=200).print(table)
    if undone := [name for name in every if name not in results]:
        print(f"--minutes = {options.minutes:g} are over: {len(undone)} left; repeat the command for them")
    must_hold = [name for name in results if name not in accelerator_speed.measurements(options.tiny)]
    return all(results[name].get("passed", False) for name in must_hold)


def main() -> None:
    """Checks, measures, prints."""
    try:
        good = run(tyro.cli(Options))
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

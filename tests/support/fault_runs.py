"""The smallest of runs, and what is compared of two of them: everything, bit for bit."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mod_star.runs.checkpoints import saved_steps
from mod_star.runs.integrity import find_damage

# A dense block of width 8: a process of it is mostly start-up. At a constant rate, runs of all lengths share a step.
SMALLEST = shlex.split(
    "--preset tiny --model.width 8 --model.heads 1 --model.mlp-width 8 --model.layers 1 --model.context 16 "
    "--routing.every 0 --optimizer.schedule constant --optimizer.warmup-steps 0 "
    "--train.batch-size 2 --train.eval-batches 2 --train.log-every 1"
)


def options(**train: int) -> list[str]:
    """Options of `mod-star train` for the smallest run, with these fields of `train`."""
    return SMALLEST + [word for name, value in train.items() for word in (f"--train.{name}", str(value))]


def fresh_seed() -> int:
    """Another one every time; MOD_STAR_FAULT_SEED=... makes the same choices again (not the machine's own timing)."""
    return int(os.environ.get("MOD_STAR_FAULT_SEED") or secrets.randbelow(1_000_000))


def complaints(err: str) -> list[str]:
    """Lines of standard error, but for Orbax's remarks on saves that took long and on half-deleted checkpoints."""
    return [line for line in err.splitlines() if not line.startswith("WARNING:absl:")]


def newest(run: Path) -> int:
    """Step of the newest checkpoint, which must be whole; 0 if there is none."""
    steps = saved_steps(run / "checkpoints")
    if steps:
        assert find_damage(run / "checkpoints" / str(steps[-1])) is None
    return steps[-1] if steps else 0


def arrays(run: Path, step: int) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """All arrays of a checkpoint as Orbax alone reads them: path -> type, shape, bytes."""
    found = {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for item in ("params", "training"):
            with warnings.catch_warnings():  # that Orbax looks up where the arrays were
                warnings.simplefilter("ignore")
                tree = reader.restore((run / "checkpoints" / str(step) / item).absolute())
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                array = np.asarray(leaf)
                found[item + jax.tree_util.keystr(path)] = (str(array.dtype), array.shape, array.tobytes())
    assert len(found) > 10
    return found


def records(run: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl, less what the clock decides."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def result(run: Path) -> dict[str, Any]:
    """All that a complete run came to: the last step's arrays and data, the records, the summary less its times."""
    step = newest(run)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for name in ("directory", "seconds", "tokens_per_second", "compile_seconds"):
        del summary[name]
    files = (run / "checkpoints" / str(step) / "data").iterdir()
    data = [path.read_text(encoding="utf-8") for path in files if path.name != "commit_success.txt"]  # has the path
    assert len(data) == 1 and json.loads(data[0])
    return {"arrays": arrays(run, step), "data": data, "records": records(run), "summary": summary}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of what differs between two results."""
    found = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    if "arrays" in found:
        found += [name for name in a["arrays"] | b["arrays"] if a["arrays"].get(name) != b["arrays"].get(name)]
    return sorted(found)

"""What to change about a run or a mesh that does not fit the machine of a plan."""

from __future__ import annotations

from mod_star.planning.plan import Plan
from mod_star.units import size


def advice(plan: Plan) -> tuple[str, ...]:
    """Changes that lower the memory of a chip, those that cost least first; each says what it changes.

    Args:
      plan: one that does not fit.
    """
    changes: list[str] = []
    run, mesh, memory, chip = plan.run, plan.mesh, plan.memory, plan.topology.chip
    limit = chip.usable if chip else float("inf")
    state = memory.parameters + memory.optimizer
    shares = mesh["data"] * mesh["fsdp"]
    rows = run.train.batch_size // run.train.accumulation // shares
    if mesh["data"] > 1 and run.model.width % shares == 0:
        changes.append(
            f"--mesh.fsdp {shares} --mesh.data 1: parameters and optimizer state take {size(state / mesh['data'])} "
            f"per chip instead of {size(state)}, for more communication"
        )
    if run.model.remat != "full":
        changes.append("--model.remat full: keeps one input per block, for a quarter to a third more FLOPs")
    chunk = min(run.train.loss_chunk, run.model.context)
    logits = 4.0 * rows * chunk * run.model.vocab_size / mesh["tensor"]
    if chunk > 32 and logits > 0.02 * limit:
        changes.append(
            f"--train.loss-chunk {max(32, chunk // 4)}: the logits of a chunk take {size(logits)} per "
            "chip, several times over"
        )
    if run.thinks and run.thinking.chunk > 4:
        changes.append(f"--thinking.chunk {run.thinking.chunk // 2}: half the thoughts are scored at a time")
    if run.thinks and run.thinking.think_fraction > 0.5:
        changes.append("--thinking.think-fraction 0.5: half as many thoughts, and half the caches of sampling")
    if rows > 1:
        parts = _portions(rows, (memory.temporaries or 0.0) / max(1.0, limit - state - memory.batch))
        changes.append(
            f"--train.accumulation {run.train.accumulation * parts}: {rows // parts} of the {rows} sequences per chip "
            "at a time"
        )
    if run.model.key_heads % (mesh["tensor"] * 2) == 0 and shares % 2 == 0:
        axes = _halved(mesh)
        changes.append(
            f"{axes} --mesh.tensor {mesh['tensor'] * 2}: the activations of a sequence lie on twice the chips"
        )
    if state > 0.5 * limit:
        changes.append(f"more chips: the training state alone takes {size(state)} of {size(limit)} on each")
    elif not changes:
        changes.append("more chips, or a smaller --train.batch-size, --model.context or model")
    return tuple(changes)


def _portions(rows: int, excess: float) -> int:
    """Into how many portions to cut the rows of a chip, so that temporaries that are `excess` times too large fit."""
    parts = [count for count in range(2, rows + 1) if rows % count == 0]
    return next((count for count in parts if count >= excess), rows)


def _halved(mesh: dict[str, int]) -> str:
    axis = "data" if mesh["data"] % 2 == 0 else "fsdp"
    return f"--mesh.{axis} {mesh[axis] // 2}"

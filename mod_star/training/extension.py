"""More or fewer steps for a run that has begun: allowed if the steps that are done are the same in both.

What a step is depends on the number of all steps only through the learning rate and, with `routing.stages` or
`thinking.stages`, the capacity or the length of thoughts. If both were the same in every step that is done, the run is
from here on what it would have been from its first step on, bit for bit. If not, a schedule needs the number of steps,
and says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mod_star.config import RunConfig
from mod_star.errors import InputError
from mod_star.parts import load_parts
from mod_star.stages import StagePlan, plan_stages
from mod_star.training.optimizer import make_schedule


def require_extendable(old: RunConfig, new: RunConfig, done: int, redraw: bool) -> None:
    """Raises InputError unless a run of `old` that has done some steps may go on as one of `new`.

    Args:
      old: the stored configuration.
      new: the same, but for `train.steps` and `train.flops`.
      done: steps up to the checkpoint to go on from.
      redraw: the learning rate may follow the schedule of the new number of steps from here on.

    Raises:
      InputError: more steps are done than asked for, or a schedule that needs their number has been followed.
    """
    before, after = plan_stages(old), plan_stages(new)
    what = f"train.steps = {after.steps}" if new.train.flops is None else f"train.flops = {new.train.flops:g}"
    if after.steps < done:
        came_to = "" if new.train.flops is None else f" ({after.steps} steps)"
        raise InputError(f"{what}{came_to}: the run has done {done} already; --resume-from goes on from an earlier one")
    if after.steps == before.steps:
        return
    at = f"{what}: the run was begun with {before.steps} steps"
    if _settings(before, done) != _settings(after, done):
        group = old.routing if before.changes == "capacity" else old.thinking
        name = "routing.stages" if before.changes == "capacity" else "thinking.stages"
        raise InputError(
            f"{at}, and {name} = {group.stages} needs their number: it has set the {before.changes} of the "
            f"{done} steps that are done; start another run with --init-from"
        )
    if load_parts(new.parts).optimizer is not None and not redraw:
        raise InputError(
            f"{at}, and parts.optimizer, which is yours, is given their number: --redraw-schedule goes on with the "
            f"optimizer of {after.steps} steps from step {done + 1} on"
        )
    steps = np.arange(done)
    first, second = (np.asarray(make_schedule(old.optimizer, plan.steps)(steps)) for plan in (before, after))
    if redraw or not (differ := np.flatnonzero(np.broadcast_to(first != second, (done,)))).size:
        return
    needing = f"optimizer.schedule = {old.optimizer.schedule!r}"
    if differ[0] < old.optimizer.warmup_steps:
        needing = f"optimizer.warmup_steps = {old.optimizer.warmup_steps} (at most half of the steps)"
    raise InputError(
        f"{at}, and {needing} needs their number: the learning rate of steps {differ[0] + 1} to {done} is not that of "
        f"{after.steps} steps. --redraw-schedule takes the rates of {after.steps} steps from step {done + 1} on; "
        f"--resume-from goes back to a checkpoint of step {differ[0]} or before"
    )


def _settings(plan: StagePlan, done: int) -> list[tuple[int, dict[str, Any]]]:
    """(last step, what it was trained at) of the stages that the steps that are done were in."""
    return [(min(stage.last, done), plan.setting_of(stage)) for stage in plan.stages if stage.first <= done]

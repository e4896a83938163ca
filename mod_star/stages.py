"""Capacity in stages: the capacities of a run, the steps of each, and their cost.

A dense model that is to become a Mixture-of-Depths model (`mod_star.pretrained.upcycle`) loses too much if its routed
blocks are left with an eighth of the tokens at once. `routing.stages` lowers the capacity step by step. A capacity is
a static shape, so each stage is a program of its own. Everything else goes on across stages: the optimizer's state, the
learning-rate schedule, the data. A run without stages has one stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mod_star.config import RunConfig
from mod_star.errors import InputError, require
from mod_star.flops import training_step_flops
from mod_star.model.routing import routed_share


@dataclass(frozen=True)
class Stage:
    """Steps that are trained at one capacity."""

    run: RunConfig
    """The run's configuration with the stage's capacity and no stages: what its steps compute."""
    first: int
    """The first step, counted from 1."""
    last: int
    """The last step."""
    step_flops: float
    """Floating-point operations of one step."""

    @property
    def capacity(self) -> float | None:
        """Share of the tokens that a routed block computes; None for a dense model."""
        routing = self.run.routing
        return routed_share(routing, self.run.model.context) if routing.every else None


@dataclass(frozen=True)
class StagePlan:
    """All stages of a run, in order, without gaps."""

    stages: tuple[Stage, ...]

    @property
    def is_staged(self) -> bool:
        """Whether the capacity changes."""
        return len(self.stages) > 1

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.stages[-1].last

    @property
    def flops(self) -> float:
        """Floating-point operations of all training steps."""
        return self.flops_until(self.steps)

    def flops_until(self, step: int) -> float:
        """Floating-point operations of the steps up to this one."""
        return sum(max(0, min(step, s.last) - s.first + 1) * s.step_flops for s in self.stages)

    def at(self, step: int) -> Stage:
        """The stage that a step belongs to; the first one for step 0, the state before any."""
        return next(stage for stage in self.stages if step <= stage.last)


def plan_stages(run: RunConfig) -> StagePlan:
    """The stages of a run, whose `model.vocab_size` is known: as many steps as asked for, or as the budget allows.

    Raises:
      InputError: the budget doesn't reach for one step, or there are too few steps for every stage to have one.
    """
    configs = stage_configs(run)
    flops = [training_step_flops(config) for config in configs]
    budget = run.train.flops
    steps = run.train.steps if budget is None else _steps_within(budget, run, flops)
    require(steps >= 1, "train.flops", budget, f"must be at least one step's, {flops[0]:.3g}")
    ends = _last_steps(run, steps)
    stages = [
        Stage(config, before + 1, last, cost)
        for config, before, last, cost in zip(configs, [0, *ends], ends, flops, strict=False)
    ]
    if short := [stage for stage in stages if stage.last < stage.first]:
        field = f"train.steps = {steps}" if budget is None else f"train.flops = {budget!r}"
        raise InputError(
            f"{field}: leaves no step for capacity {short[0].run.routing.capacity} of routing.stages = "
            f"{run.routing.stages}, with routing.stage_fraction = {run.routing.stage_fraction}"
        )
    return StagePlan(tuple(stages))


def stage_configs(run: RunConfig) -> list[RunConfig]:
    """The configuration of each stage, see `Stage.run`; without stages the run's own."""
    routing = run.routing
    if not (routing.stages and routing.every):
        return [run]
    capacities = (*routing.stages, routing.capacity)
    return [replace(run, routing=replace(routing, capacity=capacity, stages=())) for capacity in capacities]


def config_at(run: RunConfig, step: int) -> RunConfig:
    """What the parameters after `step` steps were trained as: the configuration of the stage of that step.

    At step 0 nothing has been trained, and the first stage is what training begins with.
    """
    return stage_configs(run)[0] if step == 0 else plan_stages(run).at(step).run


def _last_steps(run: RunConfig, steps: int) -> list[int]:
    """The last step of each stage."""
    count = len(stage_configs(run)) - 1
    share = run.routing.stage_fraction
    return [*(math.floor(steps * share * i / count + 0.5) for i in range(1, count + 1)), steps]


def _steps_within(budget: float, run: RunConfig, flops: list[float]) -> int:
    """The most steps whose stages cost no more than the budget. Costs grow with the number: capacities fall."""

    def cost(steps: int) -> float:
        ends = _last_steps(run, steps)
        return sum((last - before) * each for before, last, each in zip([0, *ends], ends, flops, strict=False))

    few, many = int(budget // max(flops)), int(budget // min(flops))
    while few < many:
        middle = (few + many + 1) // 2
        few, many = (middle, many) if cost(middle) <= budget else (few, middle - 1)
    return few

"""Capacities and lengths of thoughts of a run that has several: which steps are trained at each, and their cost.

A dense model that is to become a Mixture-of-Depths model (`mod_star.pretrained.upcycle`) loses too much if its routed
blocks are left with an eighth of the tokens at once. `routing.stages` lowers the capacity step by step.
`thinking.stages` shortens thoughts step by step, down to none (Fast Quiet-STaR, arXiv 2505.17746). Both are static
shapes, so each stage is a program of its own. Everything else goes on across stages: the optimizer's state, the
learning-rate schedule, the data. A run without stages has one stage.

With `routing.budgets` the capacities do not follow one another: every step draws its own, so that the model can be used
at each of them afterwards, as MatFormer (arXiv 2310.07707) and Flextron (arXiv 2406.10260) train one model for many
budgets. Of as many steps as there are budgets, each is drawn by one. What a step draws depends on `train.seed` and the
step's number alone. A session compiles one program per capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mod_star import random_streams
from mod_star.config import RunConfig
from mod_star.errors import InputError, require
from mod_star.flops import training_step_flops
from mod_star.model.routing import routed_share


@dataclass(frozen=True)
class Stage:
    """Steps that are trained at one capacity and one length of thoughts."""

    run: RunConfig
    """The run's configuration with the stage's capacity or length and no stages: what its steps compute."""
    first: int
    """The first step, counted from 1. With `routing.budgets`: the first of the run."""
    last: int
    """The last step. With `routing.budgets`: the last of the run."""
    step_flops: float
    """Floating-point operations of one step."""

    @property
    def capacity(self) -> float | None:
        """Share of the tokens that a routed block computes; None for a dense model."""
        routing = self.run.routing
        return routed_share(routing, self.run.model.context) if routing.every else None

    @property
    def thought_length(self) -> int | None:
        """Tokens of a thought; None for a model that does not learn to think."""
        return self.run.thinking.thought_length if self.run.thinks else None


@dataclass(frozen=True)
class StagePlan:
    """All stages of a run, in order, without gaps; or those that its steps draw from."""

    stages: tuple[Stage, ...]
    changes: str | None = None
    """What changes from stage to stage, "capacity" or "thought_length", a property of `Stage`; None: nothing."""
    drawn: npt.NDArray[np.int64] | None = field(default=None, compare=False)
    """Of each step from the first on, the number of the stage that it draws; None: the stages follow one another."""
    own: int = 0
    """Number of the stage with the run's own capacity, where steps draw."""

    def setting_of(self, stage: Stage) -> dict[str, Any]:
        """What distinguishes a stage from the others, such as {"capacity": 0.5}; empty for a run without stages."""
        return {} if self.changes is None else {self.changes: getattr(stage, self.changes)}

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
        if self.drawn is not None:
            counts = np.bincount(self.drawn[:step], minlength=len(self.stages))
            return float(sum(count * s.step_flops for count, s in zip(counts, self.stages, strict=True)))
        return sum(max(0, min(step, s.last) - s.first + 1) * s.step_flops for s in self.stages)

    def at(self, step: int) -> Stage:
        """The stage that a step belongs to; for step 0, the state before any, that of the first step."""
        if self.drawn is not None:
            return self.stages[self.drawn[max(step, 1) - 1]]
        return next(stage for stage in self.stages if step <= stage.last)

    def evaluated(self, step: int) -> tuple[Stage, ...]:
        """The stages that an evaluation after a step is of: one; where steps draw all, the run's own capacity first."""
        if self.drawn is None:
            return (self.at(step),)
        own = self.stages[self.own]
        return (own, *(stage for stage in self.stages if stage is not own))


def plan_stages(run: RunConfig) -> StagePlan:
    """The stages of a run, whose `model.vocab_size` is known: as many steps as asked for, or as the budget allows.

    Raises:
      InputError: the budget doesn't reach for one step, or there are too few steps for every stage to have one.
    """
    configs = stage_configs(run)
    flops = [training_step_flops(config) for config in configs]
    budget = run.train.flops
    if is_drawn(run):
        return _plan_draws(run, configs, flops)
    steps = run.train.steps if budget is None else _steps_within(budget, run, flops)
    require(steps >= 1, "train.flops", budget, f"must be at least one step's, {flops[0]:.3g}")
    ends = _last_steps(run, steps)
    stages = [
        Stage(config, before + 1, last, cost)
        for config, before, last, cost in zip(configs, [0, *ends], ends, flops, strict=False)
    ]
    if short := [stage for stage in stages if stage.last < stage.first]:
        length = f"train.steps = {steps}" if budget is None else f"train.flops = {budget!r}"
        group, changes = _staged_group(run)
        values, fraction = getattr(run, group).stages, getattr(run, group).stage_fraction
        value = getattr(getattr(short[0].run, group), changes)
        raise InputError(
            f"{length}: leaves no step for {changes} {value} of {group}.stages = {values}, with "
            f"{group}.stage_fraction = {fraction}"
        )
    return StagePlan(tuple(stages), _staged_group(run)[1] if len(stages) > 1 else None)


def is_drawn(run: RunConfig) -> bool:
    """Whether every step draws its capacity."""
    return bool(run.routing.budgets and run.routing.every)


def _plan_draws(run: RunConfig, configs: list[RunConfig], flops: list[float]) -> StagePlan:
    """The plan of a run whose steps draw. A budget of operations is that of the steps as they are drawn."""
    budget, costs = run.train.flops, np.asarray(flops)
    most = run.train.steps if budget is None else int(budget // min(flops))
    # Every budget once in as many steps as there are budgets, in random order. By random(), whose numbers are the same
    # however many are asked for.
    count = len(configs)
    uniform = np.random.default_rng([run.train.seed, random_streams.BUDGETS]).random((-(-most // count), count))
    drawn = np.argsort(uniform, axis=1, kind="stable").ravel()[:most]
    steps = most if budget is None else int(np.searchsorted(np.cumsum(costs[drawn]), budget, "right"))
    require(steps >= 1, "train.flops", budget, f"must be at least the first step's, {costs[drawn[:1]].sum():.3g}")
    stages = [Stage(config, 1, steps, cost) for config, cost in zip(configs, flops, strict=True)]
    changes = "capacity" if count > 1 else None
    return StagePlan(tuple(stages), changes, drawn[:steps], run.routing.budgets.index(run.routing.capacity))


def trained_capacities(run: RunConfig) -> tuple[float, ...]:
    """Capacities that the run's model can be used at: its budgets, or the one that it is trained for."""
    return run.routing.budgets or (run.routing.capacity,)


def at_capacity(run: RunConfig, capacity: float, option: str) -> RunConfig:
    """The configuration of a run's model, used at another of its budgets.

    Args:
      run: its own.
      capacity: to use it at.
      option: what the user calls it, for error messages.

    Raises:
      InputError: the model is dense, its capacity is a count, or it was not trained for this capacity.
    """
    routing = run.routing
    require(routing.every > 0, option, capacity, "must be left out: the model is dense")
    require(routing.capacity_tokens is None, option, capacity, "must be left out: routing.capacity_tokens is set")
    listed = ", ".join(f"{each:g}" for each in trained_capacities(run))
    allowed = f"must be one that the model was trained for (routing.budgets): {listed}"
    require(capacity in trained_capacities(run), option, capacity, allowed)
    return replace(run, routing=replace(routing, capacity=capacity))


def stage_configs(run: RunConfig) -> list[RunConfig]:
    """The configuration of each stage, see `Stage.run`; without stages the run's own."""
    if is_drawn(run):
        return [replace(run, routing=replace(run.routing, capacity=each)) for each in run.routing.budgets]
    name, changes = _staged_group(run)
    group = getattr(run, name)
    if not group.stages or (name == "routing" and not group.every):
        return [run]
    values = (*group.stages, getattr(group, changes))
    return [replace(run, **{name: replace(group, **{changes: value, "stages": ()})}) for value in values]


def _staged_group(run: RunConfig) -> tuple[str, str]:
    """The group of fields whose `stages` are in force, and the field that they change; a run has one of the two."""
    return ("thinking", "thought_length") if run.thinks and run.thinking.stages else ("routing", "capacity")


def config_at(run: RunConfig, step: int) -> RunConfig:
    """What the parameters after `step` steps were trained as: the configuration of the stage of that step.

    At step 0 nothing has been trained, and the first stage is what training begins with. Where steps draw their
    capacity, it is the run's own.
    """
    if is_drawn(run):
        return run
    return stage_configs(run)[0] if step == 0 else plan_stages(run).at(step).run


def _last_steps(run: RunConfig, steps: int) -> list[int]:
    """The last step of each stage."""
    count = len(stage_configs(run)) - 1
    share = getattr(run, _staged_group(run)[0]).stage_fraction
    return [*(math.floor(steps * share * i / count + 0.5) for i in range(1, count + 1)), steps]


def _steps_within(budget: float, run: RunConfig, flops: list[float]) -> int:
    """The most steps whose stages cost no more than the budget. Costs grow with the number: they fall by stage."""

    def cost(steps: int) -> float:
        ends = _last_steps(run, steps)
        return sum((last - before) * each for before, last, each in zip([0, *ends], ends, flops, strict=False))

    few, many = int(budget // max(flops)), int(budget // min(flops))
    while few < many:
        middle = (few + many + 1) // 2
        few, many = (middle, many) if cost(middle) <= budget else (few, middle - 1)
    return few

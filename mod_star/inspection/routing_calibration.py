"""Which router scores to compute: a threshold per routed block and budget, chosen on held-out text.

The threshold of a block is the quantile of its scores that the budget's share of the tokens lies above. Blocks are
done from the first to the last: what reaches a block follows from the thresholds of those before it. The first half of
the run's held-out text chooses; what the second half then computes tells how well the thresholds carry over. They are
kept in RUN/routing.json and used by the rule in `mod_star.model.threshold`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mod_star.data import Batch
from mod_star.distributed.sharding import replicated
from mod_star.errors import InputError, require
from mod_star.inspection.calibration import write_record
from mod_star.model import Decoder
from mod_star.model.routing import routed_share
from mod_star.model.threshold import with_thresholds
from mod_star.model.transformer import StackedParams, group_count
from mod_star.runs.directory import LoadedRun
from mod_star.stages import trained_capacities
from mod_star.training.objectives.next_token import forward

ROUTING_FILE = "routing.json"
BELOW_EVERYTHING = -1e30
RULES = ("threshold",)
"""Causal rules that can be asked for instead of the trained one."""
OF_BLOCKS = ("thresholds", "achieved_shares", "overflow")
"""Fields of `BudgetThresholds` with a value per routed block."""


@dataclass(frozen=True)
class BudgetThresholds:
    """The thresholds of one budget, and what they are worth on held-out text that they were not chosen by."""

    capacity: float
    """The budget, as `routing.capacity`."""
    thresholds: tuple[float, ...]
    """Of the router scores, one per routed block, from the first to the last."""
    achieved_shares: tuple[float, ...]
    """Share of the tokens that each block computes."""
    overflow: tuple[float, ...]
    """Share of the tokens that each block wanted, but had no slot left for (`routing.headroom`)."""


@dataclass(frozen=True)
class RoutingCalibration:
    """The thresholds of all budgets of a model."""

    step: int
    """Step of the checkpoint."""
    tokens: int
    """Tokens of held-out text, both halves."""
    budgets: tuple[BudgetThresholds, ...]


def require_router(run: LoadedRun, name: str, value: str) -> None:
    """Raises InputError, about what the user calls `name`, unless scores decide what the routed blocks compute."""
    routing, parts = run.config.routing, run.decoder.parts
    require(routing.every > 0, name, value, "must be left out: the model is dense")
    allowed = "must be left out: routing.selection is stochastic, which has a threshold of its own"
    require(routing.selection == "learned", name, value, allowed)
    for part in ("selection", "causal_rule"):
        allowed = f"must be left out: the run has a {part} of its own (parts.{part})"
        require(getattr(parts, part) is None, name, value, allowed)


def budget_thresholds(
    run: LoadedRun,
    capacity: float,
    batches: list[Batch],
    track: Callable[[Iterable[int]], Iterable[int]] = lambda blocks: blocks,
) -> BudgetThresholds:
    """Chooses the thresholds of one budget.

    Args:
      run: the model, at any of its budgets.
      capacity: the budget.
      batches: held-out text. The first half of its tokens chooses, the second half tells the shares.
      track: is given the numbers of the passes over the text, and yields them.

    Raises:
      InputError: there are fewer than two tokens.
    """
    decoder = run.decoder.clone(routing=dataclasses.replace(run.decoder.routing, capacity=capacity))
    share = routed_share(decoder.routing, decoder.config.context)
    G = group_count(decoder.config, decoder.routing)
    thresholds_G = np.zeros(G, np.float32)
    for block in track(range(G)):
        scores_N = _decisions(decoder, run.params, thresholds_G, batches)[0][:, block]
        N = len(scores_N)
        require(N >= 2, "held-out tokens", N, "must be at least 2")
        thresholds_G[block] = BELOW_EVERYTHING if share == 1 else np.quantile(scores_N[: (N + 1) // 2], 1 - share)
    _, selected_NxG, overflow_NxG = _decisions(decoder, run.params, thresholds_G, batches)
    second = slice((len(selected_NxG) + 1) // 2, None)
    return BudgetThresholds(
        capacity,
        tuple(thresholds_G.tolist()),
        tuple(np.mean(selected_NxG[second], 0).tolist()),
        tuple(np.mean(overflow_NxG[second], 0).tolist()),
    )


def _decisions(
    decoder: Decoder, params: StackedParams, thresholds_G: npt.NDArray[np.float32], batches: list[Batch]
) -> tuple[npt.NDArray[Any], ...]:
    """Scores, decisions and overflow of all tokens in the order of the text, padding left out: each [N, groups]."""
    parts = []
    for batch in batches:
        trace = jax.device_get(_traced(decoder, params, jnp.asarray(thresholds_G), batch))
        is_token_BxS = batch["segment_ids"] > 0
        parts.append([np.moveaxis(leaf, 1, 2)[is_token_BxS] for leaf in trace])
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _traced(
    decoder: Decoder, params: StackedParams, thresholds_G: jax.Array, batch: dict[str, jax.Array]
) -> tuple[jax.Array, ...]:
    """Scores, decisions and overflow of a batch, each [B, groups, S]."""
    decoder, params = with_thresholds(decoder, params, thresholds_G)
    trace: Any = forward(decoder, params, batch, None, "causal").trace
    return trace.scores, trace.selected, trace.overflow


def write_routing(directory: Path, calibration: RoutingCalibration) -> Path:
    """Writes RUN/routing.json, or leaves what was there. Raises InputError if it can't be written."""
    return write_record(directory / ROUTING_FILE, dataclasses.asdict(calibration))


def read_routing(directory: Path) -> RoutingCalibration | None:
    """What `write_routing` wrote; None if there is nothing. Raises InputError if it is something else."""
    path = directory / ROUTING_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        budgets = tuple(
            BudgetThresholds(float(each["capacity"]), *(tuple(map(float, each[name])) for name in OF_BLOCKS))
            for each in values["budgets"]
        )
        return RoutingCalibration(int(values["step"]), int(values["tokens"]), budgets)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        again = f"mod-star calibrate {directory} --what routing writes it anew"
        raise InputError(f"{path}: cannot be read; {again}") from None


def with_causal_rule(
    run: LoadedRun, directory: Path, rule: str | None, option: str, tell: Callable[[str], None]
) -> LoadedRun:
    """The model with another causal rule than the trained one.

    Args:
      run: the model, at the capacity that it is used at.
      directory: of the run, where its calibration is.
      rule: threshold, or None: the rule that it was trained with.
      option: what the user calls `rule`, for the error message.
      tell: is given a line if the calibration is of another step.

    Raises:
      InputError: the rule is unknown, the model cannot have it, or it is not calibrated for its capacity.
    """
    if rule is None:
        return run
    require(rule in RULES, option, rule, f"must be one of {', '.join(RULES)}")
    require_router(run, option, rule)
    calibration, command = read_routing(directory), f"mod-star calibrate {directory} --what routing"
    if calibration is None:
        raise InputError(f"{option} = {rule!r}: needs thresholds; run {command} first")
    capacity = run.config.routing.capacity
    chosen = next((each for each in calibration.budgets if each.capacity == capacity), None)
    if chosen is None or len(chosen.thresholds) != group_count(run.config.model, run.config.routing):
        raise InputError(f"{directory / ROUTING_FILE}: has no thresholds of capacity {capacity:g}; run {command} again")
    if calibration.step != run.step:
        of_steps = f"the thresholds were calibrated at step {calibration.step}, this is step {run.step}"
        tell(f"{of_steps}: {command} renews them")
    thresholds_G = jnp.asarray(chosen.thresholds, jnp.float32)
    if run.mesh is not None:
        thresholds_G = jax.device_put(thresholds_G, replicated(run.mesh))
    decoder, params = with_thresholds(run.decoder, run.params, thresholds_G)
    return dataclasses.replace(run, decoder=decoder, params=params)


def calibrated_routing(
    run: LoadedRun, batches: list[Batch], track: Callable[[Iterable[int]], Iterable[int]] = lambda blocks: blocks
) -> RoutingCalibration:
    """The thresholds of every capacity that a model was trained for; arguments as for `budget_thresholds`."""
    tokens = sum(int(np.sum(batch["segment_ids"] > 0)) for batch in batches)
    budgets = tuple(budget_thresholds(run, each, batches, track) for each in trained_capacities(run.config))
    return RoutingCalibration(run.step, tokens, budgets)

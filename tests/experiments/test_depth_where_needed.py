"""The task's labels against a loop, the arms' operations, and the report on what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.depth_where_needed.report import report
from experiments.depth_where_needed.run import ARMS, Options, plan_of
from experiments.depth_where_needed.task import FILLER, PERMUTATIONS, STATES, context_of, make_batch

WORK = 7


def test_labels_are_the_states_that_a_loop_finds() -> None:
    batch, work = make_batch(np.random.default_rng(0), 50, WORK)
    tokens, targets = (np.asarray(batch[name]) for name in ("tokens", "targets"))
    for row, labels, steps in zip(tokens, targets, work, strict=True):
        (line,) = np.nonzero(row != FILLER)
        assert len(line) == WORK + 1 == context_of(WORK) / 8 and (np.diff(line) == 1).all()
        state = row[line[0]]
        for count, place in enumerate(line):
            state = PERMUTATIONS[row[place] - STATES][state] if count else state
            assert labels[place] == state and steps[place] == count
        others = np.setdiff1d(np.arange(context_of(WORK)), line)
        assert (labels[others] == FILLER).all() and (steps[others] == -1).all()
    assert (PERMUTATIONS[0][PERMUTATIONS[1]] != PERMUTATIONS[1][PERMUTATIONS[0]]).any(), "their order matters"


def test_every_arm_costs_the_same() -> None:
    options = Options()
    dense = plan_of(options, ARMS["dense deep"], 0)[1]
    assert dense.steps == options.steps
    for arm in ARMS.values():
        run, plan = plan_of(options, arm, 0)
        assert dense.flops - max(s.step_flops for s in plan.stages) < plan.flops <= dense.flops
        assert run.routing.explore_steps == (plan.steps // 2 if arm.explores else 0)


def test_a_report_on_some_of_the_runs(tmp_path: Path) -> None:
    def result(arm: str, seed: int, steps: int, right: float) -> None:
        seen: dict[str, Any] = {"right": [right] * WORK, "loss": 1 - right}
        if not arm.startswith("dense"):
            seen |= {"hard_routed": [0.25, 0.75], "routed": [0.125, 0.125]}
        point = {"top_k": seen} | ({"causal": seen} if "routed" in seen else {})
        curve = [{"step": step, "flops": step * 100 / steps, **point} for step in sorted({10, steps})]
        name = f"{arm.replace(' ', '_')}-{seed}.json"
        (tmp_path / name).write_text(json.dumps({"arm": arm, "seed": seed, "steps": steps, "curve": curve}))

    report(tmp_path, ("dense deep", "MoD"), Console(quiet=True))
    assert not list(tmp_path.iterdir())
    result("dense deep", 0, 10, 1.0)
    result("dense deep", 1, 10, 0.5)
    result("MoD", 0, 18, 0.5)
    report(tmp_path, ("dense deep", "MoD", "stages"), Console(quiet=True))
    text = (tmp_path / "results.md").read_text()
    assert f"| dense deep | 10 |{' 0.75 |' * (WORK - 2)} 0.750 ± 0.354 |" in text
    assert "| MoD (seeds: 1) | 0.500 | 0.500 | 0.500 | 0.25 | 0.75 | 0.50 |" in text
    assert "stages" not in text and (tmp_path / "accuracy.png").stat().st_size > 10_000

"""The curves of `experiments.think_at_hard` on predictions made by hand, and its report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments.think_at_hard.report import SHARES, report
from experiments.think_at_hard.run import by_place, curves

SEQUENCES, LENGTH = 60, 40


def measured() -> dict[str, np.ndarray]:
    """A tenth start states and a tenth answers, both as uncertain; thoughts help answers alone, and harm all else."""
    kind = np.tile([2, 0, 2, 2, 2, 2, 2, 2, 2, 1], (SEQUENCES, LENGTH // 10))
    shade = np.random.default_rng(0).uniform(0, 0.01, kind.shape)
    base = np.array([1.6, 1.6, 1.0])[kind]
    return {
        "kind": kind, "base": base, "talk": base - np.array([0.0, 1.5, -0.1])[kind],
        "base_right": np.zeros(kind.shape, bool), "talk_right": kind == 1,
        "entropy": base + shade, "decider": np.array([0.0, 1.4, -0.1])[kind] + shade,
    }  # fmt: skip


def test_curves_count_what_the_rules_choose() -> None:
    found = curves(measured(), np.random.default_rng(0))
    without = 0.2 * 1.6 + 0.8 * 1.0
    at = {rule: dict(zip((0.0, *SHARES), points, strict=True)) for rule, points in found.items()}
    for rule, points in at.items():
        assert points[0.0] == {
            "share": 0.0,
            "nll": pytest.approx(without),
            "answers": pytest.approx(1.6),
            "accuracy": 0,
        }
        assert points[1.0]["nll"] == pytest.approx(without - 0.15 + 0.08) and points[1.0]["accuracy"] == 1, rule
    assert at["decider"][0.1]["nll"] == pytest.approx(without - 0.15, abs=0.01), "all answers and nothing else"
    assert at["decider"][0.1]["accuracy"] == pytest.approx(1, abs=0.1)
    assert at["entropy"][0.1]["accuracy"] == pytest.approx(0.5, abs=0.2), "start states are as uncertain"
    assert at["entropy"][0.2]["accuracy"] == pytest.approx(1, abs=0.1)
    assert at["random"][0.5]["nll"] == pytest.approx(without - 0.035, abs=0.03)


def test_report(tmp_path: Path) -> None:
    values = measured()
    for seed in (0, 1):
        result = {"seed": seed, "curves": curves(values, np.random.default_rng(seed)), "places": by_place(values)}
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps(result))
    report(tmp_path, Console(width=200, record=True))
    table = (tmp_path / "results.md").read_text()
    assert "| answer | 10.0% | 1.605 | +1.500 | +1.405 | 0.0% |" in table, table
    assert "| all else | 80.0% | 1.005 | -0.100 | -0.095 | 100.0% |" in table, table
    assert (tmp_path / "figure.png").stat().st_size > 10_000

"""The table of `experiments.quiet_star_gsm8k`, from whatever runs there are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.support.reporting import markdown, spread
from mod_star.runs.stored_config import SUMMARY_FILE
from mod_star.views.terminal import result_table

MEASURES = (
    ("eval_base_loss", "no thought", "{:.4f}"),
    ("eval_talk_loss", "a thought", "{:.4f}"),
    ("eval_loss", "on budget", "{:.4f}"),
    ("eval_gain", "gain", "{:+.4f}"),
    ("hardest", "hardest 10 %", "{:+.3f}"),
    ("eval_mixing_weight", "w", "{:.3f}"),
)


def directory(out: Path, arm: str, seed: int) -> Path:
    """Where an arm's run is kept."""
    return out / f"{arm.replace(' ', '_')}-{seed}"


def read(out: Path, arm: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Held-out measures of an arm's complete runs."""
    results = []
    for seed in seeds:
        path = directory(out, arm, seed) / SUMMARY_FILE
        if path.is_file():
            summary = json.loads(path.read_text(encoding="utf-8"))
            measures = dict(summary["evaluation"])
            if "eval_talk_loss" in measures:
                measures["hardest"] = measures["eval_gain_by_decile"][-1]
            else:
                measures["eval_base_loss"] = measures["eval_loss"]
            results.append(measures)
    return results


def report(out: Path, arms: Sequence[str], seeds: Sequence[int], console: Console) -> None:
    """Prints a table of what there is, and writes it to results.md."""
    rows = []
    for arm in arms:
        if runs := read(out, arm, seeds):
            cells = [spread([run[key] for run in runs], form) if key in runs[0] else "–" for key, _, form in MEASURES]
            rows.append([arm, *cells])
    columns = ["", *(title for _, title, _ in MEASURES)]
    console.print(result_table(f"Held-out text, nats per token; seeds: {len(seeds)}", columns, rows))
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text(markdown(columns, rows), encoding="utf-8")

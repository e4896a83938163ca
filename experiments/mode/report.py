"""The table and the picture of `experiments.mode`, made from its run directories, complete or not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from experiments.mode.run import ARMS, Options, config, name_of
from experiments.support.reporting import markdown, spread
from mod_star.flops import forward_flops
from mod_star.parts import load_parts
from mod_star.runs.directory import read_config
from mod_star.training.train import SUMMARY_FILE
from mod_star.views.pictures import as_shipped, save_figure

if TYPE_CHECKING:
    from pathlib import Path

LESS_DENSE = "held-out loss less dense"
MEASURES = {
    "FLOPs per token, thousands": "{:,.0f}",
    "parameters, thousands": "{:,.0f}",
    "held-out loss": "{:.4f}",
    "held-out loss, routed causally": "{:.4f}",
    LESS_DENSE: "{:+.4f}",
    "most used expert, times the mean": "{:.2f}",
    "null share": "{:.3f}",
    "minutes": "{:.1f}",
}


def report(options: Options) -> None:
    """Prints the table of the complete runs, and writes figure.png and results.md beside them."""
    found = {arm: [measured(options, arm, seed) for seed in range(options.seeds)] for arm in ARMS}
    arms = [arm for arm in ARMS if any(found[arm])]
    rows = []
    for measure, form in MEASURES.items():
        values = [[result[measure] for result in found[arm] if result and measure in result] for arm in arms]
        rows.append([measure, *(spread(each, form) if each else "–" for each in values)])
    rows.append(["runs", *(str(sum(map(bool, found[arm]))) for arm in arms)])
    text = markdown(["", *arms], rows)
    print(text)
    (options.out / "results.md").write_text(text, encoding="utf-8")
    plot(found, options.out / "figure.png")


def measured(options: Options, arm: str, seed: int) -> dict[str, float] | None:
    """What a complete run came to; None before."""
    path = options.out / name_of(arm, seed)
    if not (path / SUMMARY_FILE).is_file():
        return None
    summary = json.loads((path / SUMMARY_FILE).read_text(encoding="utf-8"))
    run, evaluation = read_config(path), summary["evaluation"]
    parts = load_parts(config(options, arm, seed).parts)
    result = {
        "FLOPs per token, thousands": forward_flops(run.model, run.routing, 128, parts).total / 128 / 1e3,
        "parameters, thousands": summary["parameters"] / 1e3,
        "held-out loss": evaluation["eval_loss"],
        "minutes": summary["seconds"] / 60,
    }
    optional = {
        "held-out loss, routed causally": evaluation.get("eval_loss_causal"),
        "most used expert, times the mean": _mean(evaluation.get("eval_expert_load_max")),
        "null share": _mean(evaluation.get("eval_null_share")),
    }
    dense = options.out / name_of("dense", seed) / SUMMARY_FILE
    if arm != "dense" and dense.is_file():
        loss = evaluation.get("eval_loss_causal", evaluation["eval_loss"])
        optional[LESS_DENSE] = loss - json.loads(dense.read_text())["evaluation"]["eval_loss"]
    return result | {name: value for name, value in optional.items() if value is not None}


def _mean(values: list[float] | None) -> float | None:
    return None if values is None else float(np.mean(values))


@as_shipped
def plot(found: dict[str, list[dict[str, float] | None]], path: Path) -> None:
    """Draws held-out loss less that of the dense model of the same seed: a point for each seed, a line at the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    arms = [arm for arm in reversed(ARMS) if any(result and LESS_DENSE in result for result in found[arm])]
    for height, arm in enumerate(arms):
        values = [result[LESS_DENSE] for result in found[arm] if result and LESS_DENSE in result]
        axes.plot(values, [height] * len(values), "o", color="C0", alpha=0.7)
        axes.plot([np.mean(values)] * 2, [height - 0.25, height + 0.25], color="black")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_xlabel("held-out loss less that of the dense model of the same seed (nats per byte)")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)

"""Tables and picture of `experiments.any_budget`, made from its run directories, complete or not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from experiments.any_budget.measure import LEVELS, WAYS, measured
from experiments.any_budget.run import ANY, BUDGETS, Options
from experiments.support.reporting import show_tables, spread
from mod_star.training.train import SUMMARY_FILE
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [f"{budget:g}" for budget in BUDGETS]
ROUTED = NAMES[1:]
"""Budgets at which rules differ."""
SHOWN = "0.25"
"""The budget whose shares by difficulty are shown."""


def report(options: Options) -> None:
    """Measures the complete runs, prints tables, and writes results.md and figure.png beside them."""
    console = Console()
    seeds = [seed for seed in range(options.seeds) if _summary(options, ANY, seed)]
    if not seeds:
        console.print(f"{options.out}: nothing to report yet", markup=False)
        return
    alone = against_alone(options, seeds)
    results = [measured(options, seed) for seed in seeds]
    tables = [
        ("Held-out loss, nats per token, routed as trained", ["", *NAMES], _alone_rows(alone)),
        ("Test questions: loss in nats per token", ["", *ROUTED], _rows(results, "loss", "{:.4f}")),
        ("Test questions: share of the tokens that routed blocks compute", ["", *ROUTED],
         _rows(results, "share", "{:.3f}")),
        ("Test questions: share of the tokens that found no slot", ["", *ROUTED],
         _rows(results, "overflow", "{:.3f}")),
        (f"Capacity {SHOWN}: share of a text's tokens that are computed, by steps of the solution",
         ["", *LEVELS, "most less least"], _levels(results, "share by steps")),
        (f"Capacity {SHOWN}: the same of the question's tokens alone",
         ["", *LEVELS, "most less least"], _levels(results, "share of the question by steps")),
        (f"Capacity {SHOWN}: loss by steps of the solution, nats per token, less that of top-k, sequence",
         ["", *LEVELS], _loss_levels(results)),
    ]  # fmt: skip
    show_tables(tables, options.out / "results.md", console)
    try_to_draw(options.out / "figure.png", lambda: plot(alone, results, options.out / "figure.png"))


def _summary(options: Options, arm: str, seed: int) -> dict[str, Any] | None:
    path = options.out / f"{arm}-{seed}" / SUMMARY_FILE
    if not path.is_file():
        return None
    evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["evaluation"]
    return evaluation


def against_alone(options: Options, seeds: list[int]) -> dict[str, dict[str, list[float]]]:
    """Budget -> held-out losses of the model for it alone and of that for all budgets, by seed; both also causally."""
    found: dict[str, dict[str, list[float]]] = {}
    for budget, name in zip(BUDGETS, NAMES, strict=True):
        own = found[name] = {"alone": [], "any": [], "alone, causally": [], "any, causally": []}
        for seed in seeds:
            single, whole = _summary(options, name, seed), _summary(options, ANY, seed)
            if single is None or whole is None:
                continue
            at = "" if budget == BUDGETS[-1] else f"_at_{name}"
            own["alone"].append(single["eval_loss"])
            own["alone, causally"].append(single["eval_loss_causal"])
            own["any"].append(whole[f"eval_loss{at}"])
            own["any, causally"].append(whole[f"eval_loss_causal{at}"])
    return found


def _cell(values: list[float], form: str) -> str:
    return spread(values, form) if values else "–"


def _alone_rows(alone: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    rows = [
        [label, *(_cell(alone[name][key], "{:.4f}") for name in NAMES)]
        for label, key in (
            ("a model for the budget alone", "alone"),
            ("one model for all", "any"),
            ("a model for the budget alone, causally", "alone, causally"),
            ("one model for all, causally", "any, causally"),
        )
    ]
    for label, suffix in (("all less alone, of the loss", ""), ("all less alone, causally", ", causally")):
        parts = {
            name: [
                100 * (b / a - 1)
                for a, b in zip(alone[name][f"alone{suffix}"], alone[name][f"any{suffix}"], strict=True)
            ]
            for name in NAMES
        }
        rows.append([label, *(_cell(parts[name], "{:+.2f}%") for name in NAMES)])
    return rows


def _rows(results: list[dict[str, Any]], measure: str, form: str) -> list[list[str]]:
    return [[way, *(_cell([each[name][way][measure] for each in results], form) for name in ROUTED)] for way in WAYS]


def _levels(results: list[dict[str, Any]], measure: str) -> list[list[str]]:
    rows = []
    first, last = next(iter(LEVELS)), list(LEVELS)[-1]
    for way in WAYS:
        shares = [each[SHOWN][way][measure] for each in results]
        cells = [_cell([share[level] for share in shares], "{:.3f}") for level in LEVELS]
        rows.append([way, *cells, _cell([share[last] - share[first] for share in shares], "{:+.3f}")])
    return rows


def _loss_levels(results: list[dict[str, Any]]) -> list[list[str]]:
    base = next(iter(WAYS))
    rows = []
    for way in list(WAYS)[1:]:
        cells = []
        for level in LEVELS:
            pairs = [(each[SHOWN][way]["loss by steps"], each[SHOWN][base]["loss by steps"]) for each in results]
            cells.append(_cell([own[level] - other[level] for own, other in pairs], "{:+.4f}"))
        rows.append([way, *cells])
    return rows


@as_shipped
def plot(alone: dict[str, dict[str, list[float]]], results: list[dict[str, Any]], path: Path) -> None:
    """Left: loss of the model for all budgets less that of each model for one, %. Right: shares by difficulty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, name in enumerate(NAMES):
        pairs = zip(alone[name]["alone"], alone[name]["any"], strict=True)
        values = [100 * (b / a - 1) for a, b in pairs]
        left.plot([place] * len(values), values, "o", color="C0", alpha=0.7)
        if values:
            left.plot([place - 0.2, place + 0.2], [np.mean(values)] * 2, color="black")
    left.axhspan(-1, 1, color="grey", alpha=0.15, label="within 1 %")
    left.axhline(0, color="grey", linewidth=0.8)
    left.set_xticks(range(len(NAMES)), NAMES)
    left.set_xlabel("capacity")
    left.set_ylabel("held-out loss of one model for all budgets,\nless that of a model for one (%)")
    left.legend(frameon=False)
    for way, colour in zip(WAYS, ("black", "C0", "C2", "C1", "C3"), strict=True):
        shares = np.array([[each[SHOWN][way]["share by steps"][level] for level in LEVELS] for each in results])
        style = ":" if way == "threshold, batch" else "-"
        right.plot(range(len(LEVELS)), shares.mean(0), style, color=colour, label=way, marker="o", markersize=3)
        for row in shares:
            right.plot(range(len(LEVELS)), row, "o", color=colour, alpha=0.25, markersize=3)
    right.set_xticks(range(len(LEVELS)), LEVELS)
    right.set_xlabel("steps of the solution")
    right.set_ylabel(f"share of the tokens computed,\ncapacity {SHOWN}")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)

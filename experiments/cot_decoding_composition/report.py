"""Tables and picture of `experiments.cot_decoding_composition`."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.support.reporting import show_tables, spread
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw

SHOWN_K = (1, 2, 3, 5, 10)
ONCE = ("greedy", "sampling 0.7", "sampling 1")
LABELS = {
    "greedy": "greedy",
    "sampling 0.7": "sampling, T = 0.7",
    "sampling 1": "sampling, T = 1",
    "self-consistency 0.7": "self-consistency, T = 0.7",
    "self-consistency 1": "self-consistency, T = 1",
    "log_prob max": "log p, max",
    "log_prob aggregated": "log p, aggregated",
    "normalised_log_prob max": "log p per token, max",
    "normalised_log_prob aggregated": "log p per token, aggregated",
    "majority of branches": "majority of the branches",
    "delta max": "CoT-decoding (Δ), max",
    "delta aggregated": "CoT-decoding (Δ), aggregated",
    "any branch": "any branch is right",
}
COLUMNS = (
    ("branches", "per question", "{:.2f}"),
    ("dropped", "dropped", "{:.0%}"),
    ("right", "right", "{:.0%}"),
    ("delta", "Δ", "{:.3f}"),
    ("log_prob", "log p", "{:.2f}"),
    ("normalised_log_prob", "log p/token", "{:.2f}"),
)

Results = list[dict[str, Any]]


def report(out: Path, picture: Path, console: Console) -> None:
    """Prints what there is, writes results.md beside it, and the picture."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("results-*.json"))]
    if not results:
        console.print(f"{out}: nothing to report yet", markup=False)
        return
    seeds, count = len(results), results[0]["questions"]
    tables = [
        (f"Right answers by the number of branches or samples; {seeds} seeds, {count} questions each", *by_k(results)),
        ("Branches by their first token (k = 10), means of those not dropped", *by_opening(results)),
    ]
    show_tables(tables, out / "results.md", console)
    drawn = "" if try_to_draw(picture, lambda: plot(results, picture)) else f", picture: {picture}"
    console.print(f"tables: {out / 'results.md'}{drawn}", markup=False, soft_wrap=True)


def by_k(results: Results) -> tuple[list[str], list[list[str]]]:
    """Accuracy of each way of decoding for some k, mean ± standard deviation over seeds."""
    rows = []
    for name, label in LABELS.items():
        curves = [result["accuracy"][name] for result in results]
        cells = [spread([curve[k - 1] for curve in curves], "{:.1%}") if k <= len(curves[0]) else "–" for k in SHOWN_K]
        rows.append([label, *cells])
    return ["", *(f"k = {k}" for k in SHOWN_K)], rows


def by_opening(results: Results) -> tuple[list[str], list[list[str]]]:
    """What became of the branches that begin with each token; tokens that are rare left out."""

    def mean(token: str, key: str) -> float:
        return statistics.mean(result["openings"].get(token, {}).get(key, -math.inf) for result in results)

    every = {token for result in results for token in result["openings"]}
    tokens = sorted(every, key=lambda token: (mean(token, "branches"), mean(token, "log_prob")), reverse=True)
    rows = []
    for token in tokens:
        groups = [result["openings"][token] for result in results if token in result["openings"]]
        if len(groups) < len(results):
            continue
        values = [(form, [each[key] for each in groups if key in each]) for key, _, form in COLUMNS]
        rows.append([token, *(form.format(statistics.mean(each)) if each else "–" for form, each in values)])
    return ["first token", *(title for _, title, _ in COLUMNS)], rows


@as_shipped
def plot(results: Results, path: Path) -> None:
    """Accuracy by k: means over seeds, and bands from lowest to highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = {
        "max path: what branches are ranked by": {
            "delta max": ("C0", "Δ (CoT-decoding)"),
            "normalised_log_prob max": ("C2", "log p per token"),
            "log_prob max": ("C3", "log p"),
        },
        "aggregated over branches or samples": {
            "delta aggregated": ("C0", "ΣΔ (CoT-decoding)"),
            "majority of branches": ("C1", "majority of the branches"),
            "normalised_log_prob aggregated": ("C2", "log p per token"),
            "log_prob aggregated": ("C3", "log p"),
            "self-consistency 0.7": ("C4", "self-consistency, T = 0.7"),
            "self-consistency 1": ("C5", "self-consistency, T = 1"),
        },
    }
    for axis, (title, ways) in zip(axes, panels.items(), strict=True):
        for name, (color, label) in {"any branch": ("lightgrey", "any branch is right"), **ways}.items():
            values = 100 * np.array([result["accuracy"][name] for result in results])
            k = np.arange(1, values.shape[1] + 1)
            dashes = "--" if name.startswith("normalised") else "-"  # where it lies on Δ's line, both are seen
            axis.plot(k, values.mean(0), dashes, color=color, marker="o", markersize=3, label=label)
            axis.fill_between(k, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
        axis.axhline(20, color="grey", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="branches or samples, k", xticks=range(1, values.shape[1] + 1), ylim=(0, 102))
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3)
    axes[0].set_ylabel("answers right, %\n(dotted: chance; k = 1 of the branches: greedy)")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=130)

"""Tables and picture of `experiments.quiet_star_composition`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.support.reporting import show_tables, spread
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw

CHANCE = math.log(5)
# Two tables, so that each fits a terminal.
ANSWERS = (
    ("base_answers", "no thought", "{:.3f}"),
    ("talk_answers", "greedy", "{:.3f}"),
    ("sampled_answers", "sampled", "{:.3f}"),
    ("budget_answers", "on budget", "{:.3f}"),
)
REST = (
    ("talk_accuracy", "right", "{:.1%}"),
    ("budget_accuracy", "on budget", "{:.1%}"),
    ("budget", "NLL of all", "{:.4f}"),
    ("weight", "w", "{:.2f}"),
    ("flops_per_step", "GFLOP/step", "{:.1f}"),
)

Results = dict[str, list[dict[str, Any]]]


def report(out: Path, arms: Sequence[str], steps: int, console: Console) -> None:
    """Prints what there is after `steps` steps, and writes results.md, results.json and curves.png beside it."""
    results = {arm: seeds_of_arm for arm in arms if (seeds_of_arm := read(out, arm, steps))}
    if not results:
        console.print(f"{out}: nothing to report yet", markup=False)
        return
    first = "NLL of answers (chance: ln 5 = 1.609); mean ± standard deviation over seeds"
    second = "Answers right (chance: 20 %), with a greedy thought each and on budget; all symbols"
    tables = [(first, *_table(results, ANSWERS)), (second, *_table(results, REST))]
    if shares := _shares_kept(results):
        tables.append(("Share of quiet-star's gain on answers that smaller budgets keep, thinking on budget", *shares))
    show_tables(tables, out / "results.md", console)
    last = {arm: [run["curve"][-1] | {"seed": run["seed"]} for run in runs] for arm, runs in results.items()}
    (out / "results.json").write_text(json.dumps(last, indent=2) + "\n", encoding="utf-8")
    failed = try_to_draw(out / "curves.png", lambda: plot(results, out / "curves.png"))
    picture = "" if failed else f", picture: {out / 'curves.png'}"
    console.print(f"tables: {out / 'results.md'}{picture}", markup=False, soft_wrap=True)


def read(out: Path, arm: str, steps: int) -> list[dict[str, Any]]:
    """Results of all seeds of an arm, by seed, with the curves up to `steps`."""
    results = []
    for path in sorted(out.glob(f"{arm.replace(' ', '_')}-[0-9]*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        results.append(result | {"curve": [point for point in result["curve"] if point["step"] <= steps]})
    return results


def _table(results: Results, columns: Sequence[tuple[str, str, str]]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for arm, runs in results.items():
        name = arm if len(runs) > 2 else f"{arm} (seeds: {len(runs)})"
        rows.append([name, *(spread(_values(runs, key), form) for key, _, form in columns)])
    return ["", *(title for _, title, _ in columns)], rows


def _values(runs: list[dict[str, Any]], key: str) -> list[float]:
    if key == "flops_per_step":
        return [run[key] / 1e9 for run in runs]
    return [run["curve"][-1][key] for run in runs]


def _shares_kept(results: Results) -> tuple[list[str], list[list[str]]] | None:
    """What part of the drop of the answers' NLL below chance the smaller budgets keep, by seed."""
    full = {run["seed"]: CHANCE - run["curve"][-1]["talk_answers"] for run in results.get("quiet-star", [])}
    rows = []
    for arm, runs in results.items():
        if arm.startswith("0."):
            shares = {
                run["seed"]: (CHANCE - run["curve"][-1]["budget_answers"]) / full[run["seed"]]
                for run in runs
                if run["seed"] in full
            }
            cells = [f"{shares[seed]:.0%}" if seed in shares else "–" for seed in sorted(full)]
            rows.append([arm, *cells, spread(list(shares.values()), "{:.0%}") if shares else "–"])
    return (["", *(f"seed {seed}" for seed in sorted(full)), "mean"], rows) if rows else None


@as_shipped
def plot(results: Results, path: Path) -> None:
    """The answers' NLL after a thought by step of teaching: means over seeds, and bands from lowest to highest."""
    from matplotlib.figure import Figure

    arms = [arm for arm in results if arm != "truthful brackets"]
    panels = {
        "what teaches": [arm for arm in arms if not arm.startswith(("0.", "length"))],
        "budget": [arm for arm in arms if arm.startswith("0.") or arm == "quiet-star"],
        "length of thoughts": [arm for arm in arms if arm.startswith("length") or arm == "quiet-star"],
    }
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for number, arm in enumerate(names):
            runs = results[arm]
            steps = [point["step"] for point in runs[0]["curve"]]
            values = np.array([[point["talk_answers"] for point in run["curve"]][: len(steps)] for run in runs])
            label = f"{arm} (5)" if arm == "quiet-star" and title.startswith("length") else arm
            axis.plot(steps, values.mean(0), color=f"C{number}", label=label)
            axis.fill_between(steps, values.min(0), values.max(0), color=f"C{number}", alpha=0.15, linewidth=0)
        axis.axhline(CHANCE, color="grey", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="steps of teaching", ylim=(0, None))
        axis.legend(frameon=False, fontsize=9)
    axes[0].set_ylabel("NLL of the answer after a thought, nats\n(dotted: chance, ln 5)")
    save_figure(figure, path, dpi=130)

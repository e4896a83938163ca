"""Tables and picture of `experiments.quiet_star_length`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.support.reporting import show_tables, spread
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw
from mod_star.views.plots import COLOURS, GREY

CHANCE = 20
Results = dict[str, list[dict[str, Any]]]


def report(out: Path, arms: Sequence[str], console: Console) -> None:
    """Prints what there is, and writes results.md and figure.png beside it."""
    results = {arm: runs for arm in arms if (runs := read(out, arm))}
    if not results:
        console.print(f"{out}: nothing to report yet", markup=False)
        return
    steps = range(1, 1 + len(next(iter(results.values()))[0]["after"]["with"]))
    head = ["steps of work", *map(str, steps), "all", "GFLOP"]
    title = f"Answers right in % with a greedy thought (chance: {CHANCE}); GFLOP per step of training"
    body = [[_name(arm, runs), *_cells(runs, "with"), _flops(runs)] for arm, runs in results.items()]
    without = "Without a thought, after the same training"
    of_base = [[_name(arm, runs), *_cells(runs, "without"), _flops(runs)] for arm, runs in results.items()]
    show_tables([(title, head, body), (without, head, of_base)], out / "results.md", console)
    failed = try_to_draw(out / "figure.png", lambda: plot(results, out / "figure.png"))
    picture = "" if failed else f", picture: {out / 'figure.png'}"
    console.print(f"tables: {out / 'results.md'}{picture}", markup=False, soft_wrap=True)


def read(out: Path, arm: str) -> list[dict[str, Any]]:
    """Results of all seeds of an arm, by seed."""
    paths = sorted(out.glob(f"{arm.replace(' ', '_')}-[0-9]*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _name(arm: str, runs: list[dict[str, Any]]) -> str:
    return arm if len(runs) > 2 else f"{arm} (seeds: {len(runs)})"


def _cells(runs: list[dict[str, Any]], which: str) -> list[str]:
    by_steps = [[100 * value for value in run["after"][which]] for run in runs]
    each = [spread(list(values), "{:.0f}") for values in zip(*by_steps, strict=True)]
    return [*each, spread([statistics.mean(values) for values in by_steps], "{:.1f}")]


def _flops(runs: list[dict[str, Any]]) -> str:
    return f"{runs[0]['flops_per_step'] / 1e9:.1f}"


@as_shipped
def plot(results: Results, path: Path) -> None:
    """Accuracy over the length of thoughts, a line for every two steps of work; mean and spread over seeds."""
    from matplotlib.figure import Figure

    lengths = {
        0 if arm == "no thoughts" else int(arm.split()[-1]): runs
        for arm, runs in results.items()
        if arm == "no thoughts" or arm.startswith("length ")
    }
    figure = Figure(figsize=(6.4, 4.0))
    panel = figure.subplots()
    xs = sorted(lengths)
    for index, pair in enumerate(((1, 2), (3, 4), (5, 6), (7, 8))):
        by_length = [
            [100 * statistics.mean(run["after"]["with"][n - 1] for n in pair) for run in lengths[x]] for x in xs
        ]
        mean = [statistics.mean(values) for values in by_length]
        bars = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in by_length]
        label = f"{pair[0]} and {pair[1]} steps of work"
        panel.errorbar(xs, mean, bars, color=COLOURS[index], marker="o", markersize=4, capsize=2, label=label)
    panel.axhline(CHANCE, color=GREY, linestyle=":", linewidth=1.2, label="chance")
    panel.set_xticks(xs)
    panel.set_xlabel("tokens of a thought")
    panel.set_ylabel("answers right, %")
    panel.set_ylim(0, 103)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1.0, 0.45))
    figure.tight_layout()
    save_figure(figure, path, dpi=130)

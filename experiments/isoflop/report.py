"""Tables and picture of `experiments.isoflop`, made from its run directories, complete or not."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from experiments.isoflop.run import ARMS, SWEPT, Cell, Options, cells
from experiments.support.reporting import Table, show_tables, spread
from mod_star.flops import forward_flops
from mod_star.parts import load_parts
from mod_star.runs.directory import read_config
from mod_star.runs.metrics import read_metrics
from mod_star.training.train import SUMMARY_FILE
from mod_star.units import short_number
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw
from mod_star.views.plots import COLOURS, DPI, PALE

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Reading:
    """What a run had come to when a budget was spent."""

    budget: float
    cell: Cell
    parameters: int
    steps: int
    token_flops: float
    """Operations of a forward pass, per token."""
    loss: float
    """Held out, in nats per token, routed as trained."""
    causal: float
    """The same, routed causally; of a dense model the same number."""


@dataclass(frozen=True)
class Minimum:
    """Where the loss over parameters is least."""

    parameters: float
    loss: float
    how: str
    """fit: a parabola in the logarithm of the parameters. smallest: of all sizes. edge: so, the first or the last."""


def report(options: Options, console: Console) -> None:
    """Prints what the runs have come to, and writes results.md and losses.png beside them."""
    found = {cell: read_run(options, cell) for cell in cells(options)}
    readings = [reading for run in found.values() for reading in run]
    if readings:
        tables = [sizes_table(readings), minima_table(readings), arms_table(readings, options.middle)]
        show_tables([table for table in tables if table[2]], options.out / "results.md", console)
        path = options.out / "losses.png"
        if try_to_draw(path, lambda: plot(readings, path)) is None:
            console.print(f"picture: {path}", markup=False)
    if missing := [cell.name for cell, run in found.items() if not run]:
        console.print(f"not complete, left out: {', '.join(missing)}")


def read_run(options: Options, cell: Cell) -> list[Reading]:
    """What a run came to at each budget; with stages at the largest alone. Empty before the run is complete."""
    path = options.out / cell.name
    if not (path / SUMMARY_FILE).is_file():
        return []
    summary = json.loads((path / SUMMARY_FILE).read_text(encoding="utf-8"))
    run, multiples = read_config(path), options.multiples
    forward = forward_flops(run.model, run.routing, run.model.context, load_parts(ARMS[cell.arm].parts)).total
    last = max(multiples)
    evaluations = {record["step"]: record for record in read_metrics(path) if "eval_loss" in record}
    evaluations[summary["steps"]] = summary["evaluation"]
    readings = []
    for multiple, budget in multiples.items():
        step = summary["steps"] * multiple // last
        if multiple == last or not run.routing.stages:
            loss = evaluations[step]["eval_loss"]
            causal = evaluations[step].get("eval_loss_causal", loss)
            shape = (summary["parameters"], step, forward / run.model.context)
            readings.append(Reading(budget, cell, *shape, loss, causal))
    return readings


def minimum(runs: Sequence[Reading]) -> Minimum:
    """Of runs of different sizes: the vertex of a parabola through at least four that bends upwards and has its vertex
    among them, or else the run with the smallest loss.
    """
    runs = sorted(runs, key=lambda run: run.parameters)
    x, y = np.log([run.parameters for run in runs]), np.array([run.causal for run in runs])
    if len(runs) >= 4:
        bend, slope, offset = np.polyfit(x, y, 2)
        vertex = -slope / (2 * bend)
        if bend > 0 and x[0] <= vertex <= x[-1]:
            return Minimum(float(np.exp(vertex)), float(np.polyval((bend, slope, offset), vertex)), "fit")
    least = int(y.argmin())
    how = "edge" if least in (0, len(runs) - 1) else "smallest"
    return Minimum(runs[least].parameters, float(y[least]), how)


def sizes_table(runs: Sequence[Reading]) -> Table:
    """Dense and MoD by budget and width."""
    head = ["budget, width", "steps", "dense, parameters", "MoD, parameters", "dense, FLOPs", "MoD, FLOPs"]
    head += ["dense, loss", "MoD, as trained", "MoD, causally", "causally less dense", "seeds"]
    rows = []
    for budget, width in sorted({(run.budget, run.cell.width) for run in runs}):
        dense, mod = (by_seed(runs, budget, arm, width) for arm in SWEPT)
        if seeds := sorted(dense.keys() & mod.keys()):
            pairs = [(dense[seed], mod[seed]) for seed in seeds]
            (a, b), form = pairs[0], "{:.3f}"
            rows.append([
                f"{short_number(budget)}, {width}", f"{a.steps:,}", f"{a.parameters:,}", f"{b.parameters:,}",
                f"{a.token_flops / 1e3:,.0f}k", f"{b.token_flops / 1e3:,.0f}k",
                spread([d.loss for d, _ in pairs], form), spread([m.loss for _, m in pairs], form),
                spread([m.causal for _, m in pairs], form), spread([m.causal - d.loss for d, m in pairs], "{:+.3f}"),
                str(len(seeds)),
            ])  # fmt: skip
    return "Held-out loss in nats per token by training budget and width", head, rows


def minima_table(runs: Sequence[Reading]) -> Table:
    """The least loss of dense and MoD models by budget: of the seeds that have all widths that any has."""
    head = ["budget", "dense, parameters", "dense, loss", "MoD, parameters", "MoD, loss", "MoD less dense"]
    head += ["dense, found by", "MoD, found by", "seeds"]
    widths = {run.cell.width for run in runs}
    rows = []
    for budget in sorted({run.budget for run in runs}):
        curves = [
            [swept(runs, budget, arm, seed) for arm in SWEPT]
            for seed in sorted({run.cell.seed for run in runs})
        ]  # fmt: skip
        minima = [tuple(map(minimum, pair)) for pair in curves if all(len(curve) == len(widths) for curve in pair)]
        if minima:
            row = [short_number(budget)]
            for each in zip(*minima, strict=True):
                row += [
                    f"{statistics.geometric_mean([m.parameters for m in each]):,.0f}",
                    spread([m.loss for m in each], "{:.3f}"),
                ]
            row.append(spread([mod.loss - dense.loss for dense, mod in minima], "{:+.3f}"))
            row += [", ".join(dict.fromkeys(m.how for m in each)) for each in zip(*minima, strict=True)]
            rows.append([*row, str(len(minima))])
    return "Least loss over parameters by budget, MoD routed causally", head, rows


def arms_table(runs: Sequence[Reading], width: int) -> Table:
    """What arms lose or gain on the dense model of the same width and seed, routed causally."""
    budgets = sorted({run.budget for run in runs})
    dense = {budget: by_seed(runs, budget, "dense", width) for budget in budgets}
    rows = []
    for arm in ARMS:
        columns = []
        for budget in budgets:
            own = by_seed(runs, budget, arm, width) if arm != "dense" else {}
            gaps = [own[seed].causal - dense[budget][seed].loss for seed in own.keys() & dense[budget].keys()]
            columns.append(spread(gaps, "{:+.3f}") if gaps else "–")
        if set(columns) != {"–"}:
            rows.append([arm, *columns, str(len(gaps))])
    head = ["", *(short_number(budget) for budget in budgets), "seeds"]
    return f"Held-out loss at width {width} less that of the dense model with the same seed, causally", head, rows


def by_seed(runs: Sequence[Reading], budget: float, arm: str, width: int) -> dict[int, Reading]:
    """The readings of one kind of model at one budget."""
    return {
        run.cell.seed: run
        for run in runs
        if (run.budget, run.cell.arm, run.cell.width) == (budget, arm, width)
    }  # fmt: skip


def swept(runs: Sequence[Reading], budget: float, arm: str, seed: int) -> list[Reading]:
    """The runs that differ in size alone, small ones first."""
    chosen = [run for run in runs if (run.budget, run.cell.arm, run.cell.seed) == (budget, arm, seed)]
    return sorted(chosen, key=lambda run: run.parameters)


@as_shipped
def plot(runs: Sequence[Reading], path: Path) -> None:
    """Draws loss over parameters, a panel for each budget: a point for each seed, lines through the means."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    budgets = sorted({run.budget for run in runs})
    figure = Figure(figsize=(4.2 * len(budgets) + 2, 4.6), dpi=DPI, layout="constrained")
    for axes, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        for arm, colour, marker in zip(ARMS, COLOURS, "osD^vX", strict=False):
            _curve(axes, [run for run in runs if (run.budget, run.cell.arm) == (budget, arm)], colour, marker)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{short_number(budget)} FLOP", loc="left")
        axes.set_xlabel("parameters")
        axes.grid(color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("held-out loss, causally (nats per token)")
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    arms = [arm for arm in ARMS if arm in handles]
    figure.legend([handles[arm] for arm in arms], arms, loc="outside right upper", frameon=False)
    save_figure(figure, path)


def _curve(axes: Axes, runs: Sequence[Reading], colour: str, marker: str) -> None:
    if not runs:
        return
    axes.plot([r.parameters for r in runs], [r.causal for r in runs], marker, color=colour, alpha=0.35, markersize=4)
    sizes = sorted({run.parameters for run in runs})
    means = [statistics.mean(run.causal for run in runs if run.parameters == size) for size in sizes]
    arm = runs[0].cell.arm
    line = "-" if arm in SWEPT else ""
    axes.plot(sizes, means, line + marker, color=colour, label=arm, fillstyle="full" if arm in SWEPT else "none")

"""Tables and plot of `experiments.mod_vs_dense`, made from its run directories, complete or not."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from experiments.support.reporting import markdown, spread
from mod_star.flops import training_step_flops
from mod_star.model.routing import capacity_of
from mod_star.runs.directory import is_run, read_config
from mod_star.runs.metrics import METRICS_FILE, read_metrics
from mod_star.training.train import SUMMARY_FILE
from mod_star.units import short_number
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw
from mod_star.views.plots import COLOURS, DOTTED, DPI, GREY, INK, PALE, SOLID
from mod_star.views.terminal import result_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {"dense": "dense", "mod": "MoD", "stochastic": "stochastic"}

# What is measured of a complete run: key, the table's words, how its numbers are shown.
MEASURES = (
    ("steps", "optimizer steps", "{:,.0f}"),
    ("tokens", "tokens, millions", "{:.2f}"),
    ("minutes", "minutes in training steps", "{:.1f}"),
    ("loss", "held-out loss, as trained", "{:.4f}"),
    ("loss_causal", "held-out loss, causally", "{:.4f}"),
    ("gap", "causal gap", "{:+.4f}"),
    ("accuracy", "predictor accuracy", "{:.2%}"),
    ("skip", "accuracy of always “skip”", "{:.2%}"),
    ("routed", "routed share, causally", "{:.2%}"),
    ("overflow", "turned away, slots full", "{:.3%}"),
    ("gate", "gate of routed tokens", "{:.3f}"),
)

MARKED: dict[str, Any] = {"marker": "o", "markersize": 3.5}
FAINT: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.6}
# Dark and thin: both routings nearly coincide, and either must be seen.
DASHES: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 4))}


@dataclass(frozen=True)
class Run:
    """One run as far as it has come."""

    arm: str
    seed: int
    step_flops: float
    records: list[dict[str, Any]]
    """As in metrics.jsonl."""
    result: dict[str, float]
    """The values of `MEASURES` that this arm has; empty until the run is complete."""


def report(out: Path, arms: Sequence[str], seeds: int) -> None:
    """Prints what the runs have come to, and writes results.json, results.md and curves.png beside them."""
    by_name = {(arm, seed): read_run(out, arm, seed) for arm in arms for seed in range(seeds)}
    runs = [run for run in by_name.values() if run is not None]
    complete = [run for run in runs if run.result]
    missing = [_missing(name, run) for name, run in by_name.items() if run is None or not run.result]
    console = Console(highlight=False)
    if complete:
        _write_results(out, complete, missing, console)
    measured = any("eval_loss" in record for run in runs for record in run.records)
    if measured and try_to_draw(out / "curves.png", lambda: plot(runs, arms, out / "curves.png")) is None:
        console.print(f"plot: {out / 'curves.png'}", markup=False, soft_wrap=True)
    if missing:
        console.print(f"not complete, left out of the tables: {', '.join(missing)}")


def read_run(out: Path, arm: str, seed: int) -> Run | None:
    """What there is of a run; None before its first record."""
    path = out / f"{arm}-{seed}"
    if not is_run(path) or not (path / METRICS_FILE).is_file():
        return None
    config, records = read_config(path), read_metrics(path)
    result: dict[str, float] = {}
    if (path / SUMMARY_FILE).is_file():
        summary = json.loads((path / SUMMARY_FILE).read_text(encoding="utf-8"))
        evaluation = summary["evaluation"]
        result = {
            "steps": summary["steps"],
            "tokens": summary["tokens"] / 1e6,
            "minutes": summary["seconds"] / 60,
            "loss": evaluation["eval_loss"],
        }
        if config.routing.every:
            result |= {
                "loss_causal": evaluation["eval_loss_causal"],
                "gap": evaluation["causal_gap"],
                "routed": statistics.mean(evaluation["eval_routed_fraction"]),
                "overflow": statistics.mean(evaluation["eval_overflow"]),
                "gate": _gate(records, summary["steps"]),
            }
        if arm == "mod":  # the control decides by chance: nothing to predict
            result["accuracy"] = evaluation["eval_predictor_accuracy"]
            result["skip"] = 1 - capacity_of(config.routing, config.model.context) / config.model.context
    return Run(arm, seed, training_step_flops(config), records, result)


def _gate(records: list[dict[str, Any]], steps: int) -> float:
    """Mean gate of the tokens that top-k routing chose, over blocks and the last tenth of training."""
    return statistics.mean(
        statistics.mean(record["gate_mean"])
        for record in records
        if "gate_mean" in record and record["step"] > 0.9 * steps
    )


def _missing(name: tuple[str, int], run: Run | None) -> str:
    state = "not begun" if run is None else f"at step {run.records[-1]['step'] if run.records else 0}"
    return f"{name[0]}-{name[1]} ({state})"


def _write_results(out: Path, runs: list[Run], missing: list[str], console: Console) -> None:
    tables = [_measures_table(runs), _differences_table(runs)]
    budget = short_number(max(run.step_flops * run.result["steps"] for run in runs))
    counts = ", ".join(f"{NAMES[arm]} {len(_of(runs, arm))}" for arm in _arms(runs))
    titles = [
        f"Equal training compute, {budget} FLOP per run; mean ± standard deviation over seeds (runs: {counts})",
        "Held-out loss less that of the dense model with the same seed, nats per token",
    ]
    text = ""
    for title, (columns, rows) in zip(titles, tables, strict=True):
        if rows:
            console.print(f"\n{title}", style="bold")
            console.print(result_table("", columns, rows))
            text += f"{title}:\n\n{markdown(columns, rows)}\n"
    values = {f"{run.arm}-{run.seed}": run.result for run in runs}
    results = {"runs": values, "missing": missing}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (out / "results.md").write_text(text, encoding="utf-8")
    console.print(f"tables: {out / 'results.md'}, numbers: {out / 'results.json'}", markup=False, soft_wrap=True)


def _measures_table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    arms = _arms(runs)
    rows = []
    for key, name, form in MEASURES:
        values = {arm: [run.result[key] for run in _of(runs, arm) if key in run.result] for arm in arms}
        rows.append([name, *(spread(values[arm], form) if values[arm] else "–" for arm in arms)])
    return ["", *(NAMES[arm] for arm in arms)], rows


def _differences_table(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    dense = {run.seed: run.result["loss"] for run in _of(runs, "dense")}
    rows = []
    for arm in _arms(runs):
        for key, how in (("loss", "as trained"), ("loss_causal", "causally")):
            differences = {
                run.seed: run.result[key] - dense[run.seed]
                for run in _of(runs, arm)
                if run.arm != "dense" and run.seed in dense
            }
            if differences:
                cells = [f"{differences[seed]:+.4f}" if seed in differences else "–" for seed in sorted(dense)]
                rows.append([f"{NAMES[arm]}, {how}", *cells, spread(list(differences.values()), "{:+.4f}")])
    return ["", *(f"seed {seed}" for seed in sorted(dense)), "mean"], rows


def _arms(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(run.arm for run in runs))


def _of(runs: list[Run], arm: str) -> list[Run]:
    return [run for run in runs if run.arm == arm]


@as_shipped
def plot(runs: list[Run], arms: Sequence[str], path: Path) -> None:
    """Draws held-out loss against training FLOPs, and below it the predictor's accuracy: means, and bands from the
    lowest to the highest seed.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter, PercentFormatter

    figure = Figure(figsize=(8.5, 7.0), dpi=DPI, layout="constrained")
    losses, accuracy = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    for arm, colour in zip(arms, COLOURS, strict=False):
        of_arm = _of(runs, arm)
        finals = [run.result["loss"] for run in of_arm if run.result]
        label = f"{NAMES[arm]}: {spread(finals, '{:.3f}')}" if finals else NAMES[arm]
        _band(losses, of_arm, "eval_loss", colour, SOLID | MARKED, label)
        _band(losses, of_arm, "eval_loss_causal", colour, DASHES)
        if arm == "mod":
            _band(accuracy, of_arm, "eval_predictor_accuracy", colour, SOLID | MARKED, "held out")
            _band(accuracy, of_arm, "predictor_accuracy", colour, FAINT, "training batches")
            skip = [run.result["skip"] for run in of_arm if run.result]
            if skip:
                accuracy.axhline(skip[0], color=GREY, label="always “skip”", **DOTTED)
    losses.set_title("Equal training FLOPs", loc="left", fontsize=12, fontweight="bold")
    losses.set_ylabel("held-out loss (nats per token)")
    losses.add_artist(
        losses.legend(loc="upper right", title="held-out loss at the end", alignment="left", frameon=False)
    )
    styles = [
        Line2D([], [], color=GREY, label="routed as trained", **SOLID),
        Line2D([], [], label="routed causally", **DASHES),
        Patch(color=GREY, alpha=0.2, linewidth=0, label="from the lowest seed to the highest"),
    ]
    losses.legend(handles=styles, loc="lower left", frameon=False, fontsize=9)
    accuracy.set_ylabel("predictor accuracy (MoD)")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    accuracy.xaxis.set_major_formatter(EngFormatter(unit="FLOP"))
    accuracy.set_xlabel("training compute")
    accuracy.set_ylim(bottom=0.8)
    if accuracy.get_legend_handles_labels()[0]:
        accuracy.legend(loc="lower right", frameon=False, fontsize=9)
    for axes in (losses, accuracy):
        axes.grid(color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    save_figure(figure, path)


def _band(axes: Axes, runs: list[Run], name: str, colour: str, style: dict[str, Any], label: str | None = None) -> None:
    """Draws the mean over the runs that have reached a step, and the range where there are several."""
    steps, columns = _columns(runs, name)
    if not steps.size:
        return
    x = steps * runs[0].step_flops
    axes.plot(x, [np.mean(column) for column in columns], label=label, **{"color": colour} | style)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _columns(runs: list[Run], name: str) -> tuple[npt.NDArray[np.int64], list[list[float]]]:
    """Steps, ascending, and at each the values of the runs that recorded one."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for record in run.records:
            if name in record:
                values.setdefault(record["step"], []).append(record[name])
    return np.array(sorted(values), np.int64), [values[step] for step in sorted(values)]

"""Tables and plot of `experiments.upcycle_smollm2`, made from its runs, complete or not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from experiments.support.reporting import markdown
from experiments.upcycle_smollm2.arms import Arm, Options, arms, directory
from mod_star.errors import InputError
from mod_star.flops import forward_flops
from mod_star.runs.metrics import METRICS_FILE, read_metrics
from mod_star.runs.stored_config import SUMMARY_FILE, is_run, read_config
from mod_star.stages import StagePlan, plan_stages
from mod_star.units import short_number
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw
from mod_star.views.plots import COLOURS, DASHED, DPI, GREY, PALE, SOLID
from mod_star.views.terminal import result_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
MARKED: dict[str, Any] = {"marker": "o", "markersize": 3.5}


def report(options: Options) -> None:
    """Prints what there is, and writes results.md, results.json and upcycle_smollm2.png."""
    before_file = options.out / f"before-{options.seed}.json"
    if not before_file.is_file():
        raise InputError(f"{options.out}: holds no results yet")
    before = json.loads(before_file.read_text(encoding="utf-8"))
    by_arm = {arm.name: read_arm(options, arm, before) for arm in arms(options)}
    runs = {name: run for name, run in by_arm.items() if run is not None}
    console, text = Console(highlight=False), ""
    for title, columns, rows in (before_table(before), *([losses_table(runs), ends_table(runs)] if runs else [])):
        console.print(result_table(title, columns, rows))
        text += f"{title}:\n\n{markdown(columns, rows)}\n"
    (options.out / "results.md").write_text(text, encoding="utf-8")
    results = {"before": before, "runs": {name: {k: run[k] for k in run if k != "plan"} for name, run in runs.items()}}
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    picture = options.out / "upcycle_smollm2.png"
    drawn = bool(runs) and try_to_draw(picture, lambda: plot(runs, options)) is None
    if missing := [name for name, run in by_arm.items() if run is None or not run["complete"]]:
        console.print(f"not complete: {', '.join(missing)}")
    written = f"results.md, results.json{', ' + picture.name if drawn else ''}"
    console.print(f"written: {written} in {options.out}", markup=False, soft_wrap=True)


def read_arm(options: Options, arm: Arm, before: dict[str, Any]) -> dict[str, Any] | None:
    """What an arm's run has measured; None before its first evaluation."""
    path = directory(options, arm)
    if not is_run(path) or not (path / METRICS_FILE).is_file():
        return None
    records = [record for record in read_metrics(path) if "eval_loss" in record]
    if not records:
        return None
    config = read_config(path)
    plan = plan_stages(config)
    summary = json.loads((path / SUMMARY_FILE).read_text()) if (path / SUMMARY_FILE).is_file() else {}
    # What training begins with: the dense model, or without stages one that is cut to its capacity.
    first = before["dense" if arm.capacity is None else "MoD 1" if arm.staged else arm.name.removesuffix(" at once")]
    model, tokens = config.model, config.model.context
    return {
        "complete": bool(summary),
        "plan": plan,
        "steps": plan.steps,
        "tokens": plan.steps * config.train.batch_size * tokens,
        "flops": plan.flops,
        "seconds": summary.get("seconds"),
        "forward_per_token": forward_flops(model, plan.stages[-1].run.routing, tokens).total / tokens,
        "evaluations": [{"step": 0, "flops": 0.0, **first}]
        + [record | {"flops": plan.flops_until(record["step"])} for record in records],
    }


def before_table(before: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Held-out loss before any training."""
    rows = [[name, *_losses(losses)] for name, losses in before.items()]
    return "Before training, nats per token", ["", "top-k", "causal"], rows


def losses_table(runs: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Held-out losses along the way."""
    rows = []
    for name, run in runs.items():
        for evaluation in run["evaluations"]:
            capacity = run["plan"].at(evaluation["step"]).capacity
            rows.append(
                [
                    f"{name}, step {evaluation['step']}",
                    "–" if capacity is None else f"{capacity:.4g}",
                    f"{evaluation['flops'] / run['flops']:.0%}",
                    *_losses(evaluation),
                ]
            )
    return "Held-out loss, nats per token", ["", "capacity", "of the budget", "top-k", "causal"], rows


def ends_table(runs: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """What the budget bought, and what the model costs afterwards."""
    dense = runs["dense"] if "dense" in runs else next(iter(runs.values()))
    rows = []
    for name, run in runs.items():
        last = run["evaluations"][-1]
        accuracy, routed = last.get("eval_predictor_accuracy"), last.get("eval_routed_fraction")
        rows.append(
            [
                name,
                f"{run['steps']:,}",
                f"{run['tokens']:,}",
                short_number(run["flops"]),
                f"{run['forward_per_token'] / dense['forward_per_token']:.1%}",
                "–" if accuracy is None else f"{accuracy:.1%}",
                "–" if routed is None else f"{np.mean(routed):.1%}",
                "–" if run["seconds"] is None else f"{run['seconds'] / 60:.1f}",
            ]
        )
    columns = ["", "steps", "tokens", "FLOP", "forward pass", "predictor right", "routed causally", "minutes"]
    return "What the budget bought; the forward pass afterwards, of the dense model's", columns, rows


def _losses(evaluation: dict[str, Any]) -> list[str]:
    causal = evaluation.get("eval_loss_causal")
    return [f"{evaluation['eval_loss']:.3f}", "–" if causal is None else f"{causal:.3f}"]


@as_shipped
def plot(runs: dict[str, Any], options: Options) -> None:
    """Held-out loss against training FLOPs; below, the capacity in force."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, PercentFormatter

    figure = Figure(figsize=(8.5, 7.0), dpi=DPI, layout="constrained")
    losses, capacity = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
        x = [evaluation["flops"] for evaluation in run["evaluations"]]
        for key, style in (("eval_loss", SOLID | MARKED), ("eval_loss_causal", DASHED)):
            y = [evaluation.get(key, np.nan) for evaluation in run["evaluations"]]
            label = f"{name}: {y[-1]:.3f}" if key == "eval_loss" else None
            losses.plot(x, y, color=colour, label=label, **style)
        if name != "dense":
            _draw_capacity(capacity, run["plan"], colour)
    # A model that is cut without training starts far above everything else.
    shown = [evaluation.get(key) for run in runs.values() for evaluation in run["evaluations"][1:] for key in
             ("eval_loss", "eval_loss_causal") if evaluation.get(key) is not None]  # fmt: skip
    low = min(evaluation["eval_loss"] for run in runs.values() for evaluation in run["evaluations"])
    losses.set_ylim(low - 0.05 * (max(shown) - low), max(shown) + 0.05 * (max(shown) - low))
    losses.set_title("SmolLM2-135M on GSM8K at equal training FLOPs", loc="left", fontsize=12, fontweight="bold")
    losses.set_ylabel("held-out loss (nats per token)")
    losses.add_artist(
        losses.legend(loc="upper right", title="held-out loss at the end", alignment="left", frameon=False)
    )
    styles = [Line2D([], [], color=GREY, label=what, **style)
              for what, style in (("routed as trained", SOLID), ("routed causally", DASHED))]  # fmt: skip
    losses.legend(handles=styles, loc="upper center", frameon=False, fontsize=9)
    capacity.set_ylabel("capacity")
    capacity.set_ylim(0, 1.05)
    capacity.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    capacity.xaxis.set_major_formatter(EngFormatter(unit="FLOP"))
    capacity.set_xlabel("training compute")
    for axes in (losses, capacity):
        axes.grid(color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    save_figure(figure, options.out / "upcycle_smollm2.png")


def _draw_capacity(axes: Axes, plan: StagePlan, colour: str) -> None:
    edges = [0.0, *(plan.flops_until(stage.last) for stage in plan.stages)]
    axes.stairs([stage.capacity or 1.0 for stage in plan.stages], edges, color=colour, baseline=None, linewidth=1.8)

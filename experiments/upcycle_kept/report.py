"""Tables and plot of `experiments.upcycle_kept`, made from its results.json, complete or not."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments.support.reporting import Table, show_tables
from mod_star.errors import InputError
from mod_star.evaluation.intervals import Estimate
from mod_star.views.pictures import as_shipped, save_figure
from mod_star.views.plots import COLOURS, DPI, GREY, INK, PALE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from experiments.upcycle_kept.arms import Options

AT = " at "
"""Between the name of an arm and its share of the FLOPs."""
BEFORE = {
    "cut": COLOURS[0],
    "fitted routers": COLOURS[1],
    "+ kept keys/values": COLOURS[2],
    "adapter alone": COLOURS[3],
    "+ adapter": COLOURS[4],
}
"""Arms before training, with the colours of their lines."""
AFTER = {
    "old recipe": COLOURS[0],
    "routers only": COLOURS[1],
    "+ kept keys/values": COLOURS[2],
    "+ adapter": COLOURS[4],
    "+ distillation": COLOURS[5],
    "+ LoRA": INK,
    "all weights": COLOURS[3],
}
"""The same after training."""


def report(options: Options) -> None:
    """Prints the tables of what there is, and writes results.md and figure.png."""
    file = options.out / "results.json"
    if not file.is_file():
        raise InputError(f"{options.out}: holds no results yet")
    results = json.loads(file.read_text(encoding="utf-8"))
    tables = [untrained_table(results.get("untrained", {}))]
    if "trained" in results:
        tables.append(trained_table(results["trained"]))
    if "likelihood" in results:
        tables.append(likelihood_table(results["likelihood"]))
    if "decoding" in results:
        tables.append(decoding_table(results["decoding"]))
    show_tables(tables, options.out / "results.md", Console(highlight=False))
    plot(results, options)


def untrained_table(measured: dict[str, Any]) -> Table:
    """Held-out losses before any training, of each arm at each cost."""
    rows = []
    for name, each in measured.items():
        routed = f"{each['first']}, {each['first'] + each['every']}, …" if "every" in each else "–"
        capacity = f"{each['capacity']:.3f}" if "capacity" in each else "–"
        rows.append([name, routed, capacity, f"{each['share']:.1%}", *_losses(each)])
    return (
        "Before training, held-out nats per token",
        ["", "routed blocks", "capacity", "forward FLOPs", "top-k", "causal"],
        rows,
    )


def trained_table(measured: dict[str, Any]) -> Table:
    """Held-out losses after training, and what they are above the dense model's that was trained on the same tokens."""
    reference = measured["dense"]["eval_loss"] if "dense" in measured else None
    rows = []
    for name, each in measured.items():
        above = "–" if reference is None or name == "dense" else f"{each['eval_loss_causal'] - reference:+.3f}"
        rows.append([
            name, f"{each['share']:.1%}", f"{each['trained_parameters'] / 1e6:.1f}M", *_losses(each), above,
            f"{each['cpu_seconds'] / 60:.1f}",
        ])  # fmt: skip
    columns = ["", "forward FLOPs", "trained", "top-k", "causal", "causal less dense", "CPU minutes"]
    return "After training, held-out nats per token", columns, rows


def likelihood_table(measured: dict[str, Any]) -> Table:
    """What models think of right answers."""
    rows = [
        [name, str(Estimate(**each["csqa"])), f"{each['csqa']['n']}", _interval(each["gsm8k"]), f"{each['gsm8k']['n']}"]
        for name, each in measured.items()
    ]
    columns = ["", "CSQA, likeliest choice", "questions", "GSM8K, nats of the answer", "questions"]
    return "Likelihood of right answers", columns, rows


def _interval(of: dict[str, float]) -> str:
    return f"{of['value']:.2f} ({of['low']:.2f} to {of['high']:.2f})"


def decoding_table(measured: dict[str, Any]) -> Table:
    """Decoding speed of one row."""
    rows = [
        [share, *(f"{statistics.median(each[name]):.1f}" for name in ("dense", "upcycled")),
         f"{statistics.median(each['ratios']):.2f}", f"{min(each['ratios']):.2f} to {max(each['ratios']):.2f}",
         f"{each['routed']:.1%}"]
        for share, each in measured.items()
    ]  # fmt: skip
    columns = ["forward FLOPs", "dense, tokens/s", "upcycled, tokens/s", "ratio", "ratios of the rounds"]
    return "Decoding one row, in turns with the dense model", [*columns, "tokens computed"], rows


def _losses(each: dict[str, Any]) -> list[str]:
    causal = each.get("eval_loss_causal")
    return [f"{each['eval_loss']:.3f}", "–" if causal is None else f"{causal:.3f}"]


@as_shipped
def plot(results: dict[str, Any], options: Options) -> None:
    """Held-out loss, routed causally, over forward FLOPs, before and after training; the dense model is a level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), dpi=DPI, layout="constrained")
    before, after = figure.subplots(1, 2)
    _panel(before, results.get("untrained", {}), BEFORE, "before training")
    _panel(after, results.get("trained", {}), AFTER, "after training")
    save_figure(figure, options.out / "figure.png")


def _panel(axes: Axes, measured: dict[str, Any], colours: dict[str, str], title: str) -> None:
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    for name, colour in colours.items():
        points = [
            (each["share"], each["eval_loss_causal"])
            for full, each in measured.items()
            if full.split(AT)[0] == name
        ]  # fmt: skip
        if points:
            shares, losses = zip(*sorted(points), strict=True)
            axes.plot(shares, losses, color=colour, marker="o", label=name)
    if "dense" in measured:
        level = measured["dense"]["eval_loss"]
        axes.axhline(level, color=GREY, linewidth=1)
        axes.annotate("dense", (1.0, level), ha="right", va="top", color=GREY, xycoords=("axes fraction", "data"))
    axes.set_xlim(0.65, 0.95)
    axes.xaxis.set_major_locator(MultipleLocator(0.1))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("forward FLOPs, of the dense model's")
    axes.set_ylabel("held-out loss, routed causally (nats per token)")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.set_title(title, loc="left", fontweight="bold")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
    axes.grid(color=PALE, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)

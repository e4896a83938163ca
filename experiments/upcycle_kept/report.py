"""Tables and plot of `experiments.upcycle_kept`, made from its results.json, complete or not."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments.support.reporting import Table, show_tables
from mod_star.errors import InputError
from mod_star.views.pictures import as_shipped, save_figure
from mod_star.views.plots import COLOURS, DPI, GREY, PALE

if TYPE_CHECKING:
    from experiments.upcycle_kept.arms import Options

AT = " at "
"""Between the name of an arm and its share of the FLOPs."""


def report(options: Options) -> None:
    """Prints the tables of what there is, and writes results.md and figure.png."""
    file = options.out / "results.json"
    if not file.is_file():
        raise InputError(f"{options.out}: holds no results yet")
    results = json.loads(file.read_text(encoding="utf-8"))
    tables = [untrained_table(results.get("untrained", {}))]
    if "trained" in results:
        tables.append(trained_table(results["trained"]))
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
    """Held-out losses after training."""
    rows = [
        [name, f"{each['tokens']:,}", f"{each['trained_parameters'] / 1e6:.1f}M", *_losses(each),
         f"{each['seconds'] / 60:.1f}"]
        for name, each in measured.items()
    ]  # fmt: skip
    return "After training, held-out nats per token", ["", "tokens", "trained", "top-k", "causal", "minutes"], rows


def decoding_table(measured: dict[str, Any]) -> Table:
    """Decoding speed of one row."""
    rows = [
        [share, *(f"{statistics.median(each[name]):.1f}" for name in ("dense", "upcycled")), f"{each['ratio']:.2f}",
         f"{each['routed']:.1%}"]
        for share, each in measured.items()
    ]  # fmt: skip
    columns = ["forward FLOPs", "dense, tokens/s", "upcycled, tokens/s", "ratio", "tokens computed"]
    return "Decoding one row, in turns with the dense model", columns, rows


def _losses(each: dict[str, Any]) -> list[str]:
    causal = each.get("eval_loss_causal")
    return [f"{each['eval_loss']:.3f}", "–" if causal is None else f"{causal:.3f}"]


@as_shipped
def plot(results: dict[str, Any], options: Options) -> None:
    """Held-out loss, routed causally, over forward FLOPs: a line for each arm, the dense model as a level."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    figure = Figure(figsize=(7.5, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    untrained = results.get("untrained", {})
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, each in untrained.items():
        if AT in name:
            lines.setdefault(name.split(AT)[0], []).append((each["share"], each["eval_loss_causal"]))
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        shares, losses = zip(*sorted(points), strict=True)
        axes.plot(shares, losses, color=colour, marker="o", label=name)
    if "dense" in untrained:
        axes.axhline(untrained["dense"]["eval_loss"], color=GREY, linewidth=1)
        axes.annotate("dense", (1.0, untrained["dense"]["eval_loss"]), ha="right", va="top", color=GREY,
                      xycoords=("axes fraction", "data"))  # fmt: skip
    axes.xaxis.set_major_locator(MultipleLocator(0.1))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("forward FLOPs, of the dense model's")
    axes.set_ylabel("held-out loss, routed causally (nats per token)")
    axes.set_ylim(bottom=0)
    axes.set_title("SmolLM2-135M made cheaper without training", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(color=PALE, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, options.out / "figure.png")

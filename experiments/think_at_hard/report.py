"""Tables and picture of `experiments.think_at_hard`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.support.reporting import show_tables, spread
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw
from mod_star.views.plots import COLOURS, GREY

RULES = {"decider": "decider", "entropy": "entropy", "random": "at random", "best": "by the gain itself"}
SHARES = (0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
"""Shares of the symbols that thresholds are chosen for."""
SHOWN = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Those in the tables."""
MEASURES = {
    "nll": ("NLL of all symbols, nats", "{:.4f}"),
    "accuracy": ("Answers right (chance: 20 %)", "{:.1%}"),
    "share": ("Share of the symbols that thought", "{:.1%}"),
}

Results = list[dict[str, Any]]


def report(out: Path, console: Console) -> None:
    """Prints what there is, and writes results.md and figure.png beside it."""
    results: Results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("seed-*.json"))]
    if not results:
        console.print(f"{out}: nothing to report yet", markup=False)
        return
    tables = [
        (f"{title}, by the share asked for; {len(results)} seeds", *by_share(results, measure, form))
        for measure, (title, form) in MEASURES.items()
    ]
    tables.append(("What a thought gains, and what the rules see, by what comes next; in nats", *by_place(results)))
    show_tables(tables, out / "results.md", console)
    failed = try_to_draw(out / "figure.png", lambda: plot(results, out / "figure.png"))
    picture = "" if failed else f", picture: {out / 'figure.png'}"
    console.print(f"tables: {out / 'results.md'}{picture}", markup=False, soft_wrap=True)


def by_share(results: Results, measure: str, form: str) -> tuple[list[str], list[list[str]]]:
    """One measure of every rule at some shares, mean ± standard deviation over seeds."""
    columns = [0, *(1 + SHARES.index(share) for share in SHOWN)]
    rows = [
        [label, *(spread([result["curves"][rule][i][measure] for result in results], form) for i in columns)]
        for rule, label in RULES.items()
    ]
    return ["", *(f"{share:.0%}" for share in (0.0, *SHOWN))], rows


def by_place(results: Results) -> tuple[list[str], list[list[str]]]:
    """Means by what comes next."""
    columns = {
        "share": ("of the symbols", "{:.1%}"), "entropy": ("entropy", "{:.3f}"), "gain": ("gain", "{:+.3f}"),
        "expected": ("expected by the decider", "{:+.3f}"), "harmed": ("harmed", "{:.1%}"),
    }  # fmt: skip
    rows = [
        [place, *(spread([r["places"][place][key] for r in results], form) for key, (_, form) in columns.items())]
        for place in results[0]["places"]
    ]
    return ["what comes next", *(title for title, _ in columns.values())], rows


@as_shipped
def plot(results: Results, path: Path) -> None:
    """NLL of all symbols and right answers over the share that thought; a thin line per seed, thick ones for means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    colours = {"decider": COLOURS[0], "entropy": COLOURS[1], "random": COLOURS[2], "best": GREY}
    for panel, measure, label, scale in (
        (panels[0], "nll", "NLL of all symbols, nats", 1), (panels[1], "accuracy", "answers right, %", 100),
    ):  # fmt: skip
        for rule, name in RULES.items():
            curves = [result["curves"][rule] for result in results]
            xs = np.array([[100 * point["share"] for point in curve] for curve in curves])
            ys = np.array([[scale * point[measure] for point in curve] for curve in curves])
            for each_x, each_y in zip(xs, ys, strict=True):
                panel.plot(each_x, each_y, color=colours[rule], linewidth=0.7, alpha=0.4)
            dashes = "--" if rule == "best" else "-"
            panel.plot(xs.mean(0), ys.mean(0), dashes, color=colours[rule], marker="o", markersize=3, label=name)
        panel.set_xlabel("symbols before which the model thought, %")
        panel.set_ylabel(label)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=9)
    panels[1].axhline(20, color="grey", linestyle=":", linewidth=1)
    save_figure(figure, path, dpi=130)

"""Tables and picture of `experiments.composed`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.support.reporting import show_tables, spread
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw
from mod_star.views.plots import COLOURS

TRUNKS = ("dense", "MoD")
ARMS = {"none": "no thoughts", "budget": "on budget"}
"""The ways to think of the eight arms; k = 1 is the greedy answer."""
CONTROLS = {
    **ARMS, "taught, none": "taught, no thoughts", "decider": "by the decider", "random": "at random",
    "always": "before every symbol",
}  # fmt: skip
ANSWERS = {"max": "delta max", "aggregated": "delta aggregated"}
ARM_K = {1: "greedy", 4: "CoT, k = 4", 10: "CoT, k = 10"}
SHOWN_K = (1, 2, 3, 4, 5, 7, 10)
OPENINGS = "#(!["
CHANCE = 20
MEGA = 1e6
TICKS = (2, 3, 5, 10, 20, 50)
"""MFLOP, in the picture."""

Results = dict[tuple[str, str], list[dict[str, Any]]]
"""By trunk and way to think, what was measured of each seed."""


def report(out: Path, console: Console) -> None:
    """Prints what there is, and writes results.md and figure.png beside it."""
    results, questions = read(out)
    if not results:
        console.print(f"{out}: nothing to report yet", markup=False)
        return
    each = f"{questions} questions each; chance is {CHANCE} %"
    tables = [
        (f"The arms: answers right and MFLOP per answer; {each}", *by_arm(results)),
        ("Right answers by the number of branches, the branch with the largest Δ", *by_k(results, "max")),
        ("Right answers by the number of branches, aggregated", *by_k(results, "aggregated")),
        ("Where to think: controls", *by_way(results)),
        ("Branches of ten by their first symbol", *by_opening(results)),
    ]
    show_tables(tables, out / "results.md", console)
    failed = try_to_draw(out / "figure.png", lambda: plot(results, out / "figure.png"))
    picture = "" if failed else f", picture: {out / 'figure.png'}"
    console.print(f"tables: {out / 'results.md'}{picture}", markup=False, soft_wrap=True)


def read(out: Path) -> tuple[Results, int]:
    """What there is, in the order of the tables; and how many questions were asked."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*-[0-9]*.json"))]
    found: Results = {}
    for trunk in TRUNKS:
        for way in CONTROLS:
            if seeds := [file["ways"][way] for file in files if file["trunk"] == trunk and way in file["ways"]]:
                found[trunk, way] = seeds
    return found, files[0]["questions"] if files else 0


def _right(seeds: list[dict[str, Any]], answer: str, k: int) -> str:
    return spread([seed["right"][ANSWERS[answer]][k - 1] for seed in seeds], "{:.1%}")


def _mean(seeds: list[dict[str, Any]], key: str, k: int) -> float:
    return statistics.mean(seed[key][k - 1] for seed in seeds)


def _name(results: Results, trunk: str, way: str) -> str:
    count, most = len(results[trunk, way]), max(map(len, results.values()))
    return f"{trunk}, {CONTROLS[way]}" + ("" if count == most else f" (seeds: {count})")


def _shown(results: Results, ways: dict[str, str]) -> list[tuple[str, str]]:
    return [(trunk, way) for trunk, way in results if way in ways]


def by_arm(results: Results) -> tuple[list[str], list[list[str]]]:
    """Every arm: right answers by the largest Δ and aggregated, operations and thoughts of an answer."""
    rows = []
    for trunk, way in _shown(results, ARMS):
        seeds = results[trunk, way]
        for k, label in ARM_K.items():
            flops = [seed["flops"][k - 1] / MEGA for seed in seeds]
            rights = [_right(seeds, answer, k) for answer in ANSWERS]
            name = f"{_name(results, trunk, way)}, {label}"
            rows.append([name, *rights, spread(flops, "{:.1f}"), f"{_mean(seeds, 'thoughts', k):.2f}"])
    return ["", "right, max", "right, aggregated", "MFLOP", "thoughts"], rows


def by_k(results: Results, answer: str) -> tuple[list[str], list[list[str]]]:
    """Right answers for some k, and how often any branch of ten is right."""
    rows = []
    for trunk, way in _shown(results, ARMS):
        seeds = results[trunk, way]
        any_of_ten = spread([seed["right"]["any branch"][-1] for seed in seeds], "{:.1%}")
        rows.append([_name(results, trunk, way), *(_right(seeds, answer, k) for k in SHOWN_K), any_of_ten])
    return ["", *(f"k = {k}" for k in SHOWN_K), "any of ten"], rows


def by_way(results: Results) -> tuple[list[str], list[list[str]]]:
    """Every way to think: thoughts and operations of the greedy answer, right answers greedy and by CoT-decoding."""
    rows = []
    for trunk, way in results:
        seeds = results[trunk, way]
        flops = f"{_mean(seeds, 'flops', 1) / MEGA:.1f}"
        routed = [seed["routed"] for seed in seeds if seed["routed"] is not None]
        rows.append(
            [
                _name(results, trunk, way), _right(seeds, "max", 1), f"{_mean(seeds, 'thoughts', 1):.2f}", flops,
                _right(seeds, "max", 4), _right(seeds, "max", 10), spread(routed, "{:.0%}") if routed else "–",
            ]
        )  # fmt: skip
    return ["", "greedy", "thoughts", "MFLOP", "CoT, k = 4", "CoT, k = 10", "routed"], rows


def by_opening(results: Results) -> tuple[list[str], list[list[str]]]:
    """What became of the branches of both ways of the arms: those with each opening, and all others together."""
    rows = []
    for trunk, way in _shown(results, ARMS):
        for opening in (*OPENINGS, "others"):
            groups = []
            for seed in results[trunk, way]:
                tokens = [opening] if opening in OPENINGS else [t for t in seed["openings"] if t not in OPENINGS]
                groups += [seed["openings"][token] for token in tokens if token in seed["openings"]]
            if groups:
                count = f"{sum(group['branches'] for group in groups) / len(results[trunk, way]):.2f}"
                rows.append([f"{_name(results, trunk, way)}, {opening}", count, *_of_branches(groups)])
    return ["", "per question", "right", "Δ", "log p per symbol"], rows


def _of_branches(groups: list[dict[str, float]]) -> list[str]:
    """Means of the branches that count; a group weighs as many as it has."""
    counts = np.array([group["branches"] * (1 - group["dropped"]) for group in groups])
    cells = []
    for key, form in (("right", "{:.0%}"), ("delta", "{:.3f}"), ("normalised_log_prob", "{:.2f}")):
        values = np.array([group.get(key, 0.0) for group in groups])
        cells.append(form.format(counts @ values / counts.sum()) if counts.sum() else "–")
    return cells


@as_shipped
def plot(results: Results, path: Path) -> None:
    """Right answers over the operations of an answer: a point for every k, mean over seeds; bars: lowest to highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, answer, title in zip(
        panels, ANSWERS, ("the branch with the largest Δ", "aggregated over branches"), strict=True
    ):
        for trunk, way in _shown(results, ARMS):
            seeds = results[trunk, way]
            rights = 100 * np.array([seed["right"][ANSWERS[answer]] for seed in seeds])
            flops = np.array([seed["flops"] for seed in seeds]).mean(0) / MEGA
            mean = rights.mean(0)
            look = {"color": COLOURS[TRUNKS.index(trunk)], "marker": "o" if way == "none" else "s"}
            panel.errorbar(
                flops, mean, (mean - rights.min(0), rights.max(0) - mean), linestyle="-" if way == "none" else "--",
                markersize=4, linewidth=1.4, elinewidth=0.8, capsize=1.5, label=f"{trunk}, {ARMS[way]}", **look,
            )  # fmt: skip
            panel.plot(flops[:1], mean[:1], markersize=8, markerfacecolor="white", zorder=5, **look)
        panel.axhline(CHANCE, color="grey", linestyle=":", linewidth=1)
        panel.set(
            xscale="log", xlabel="MFLOP per answer; points: k = 1 (white: greedy) to 10", title=title, ylim=(0, 104)
        )
        panel.set_xticks(TICKS, map(str, TICKS))
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("answers right, %")
    panels[1].legend(frameon=False, fontsize=9)
    save_figure(figure, path, dpi=130)

"""Tables and picture of `experiments.depth_where_needed`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.support.reporting import show_tables, spread
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw

COLOURS = ("#1f4e79", "#7aa6d6", "#222222", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#bcbd22",
           "#7f7f7f")  # fmt: skip
Results = dict[str, list[dict[str, Any]]]
BY_CHANCE = 1 / 8
"""Share of the symbols that a routed block computes, and that are hard."""
FIRST = 3
"""Steps of work that tables begin with: all arms do one and two."""


def report(out: Path, arms: tuple[str, ...], console: Console) -> None:
    """Prints what there is, and writes results.md, results.json and accuracy.png beside it."""
    results = {arm: runs for arm in arms if (runs := read(out, arm))}
    if not results:
        console.print(f"{out}: nothing to report yet", markup=False)
        return
    tables = [
        ("Right answers by steps of work at equal operations, routed as trained", *_accuracy(results)),
        (
            "Loss in nats per hard symbol, and share of the hard symbols that each routed block computes",
            *_rest(results),
        ),
    ]
    if differences := _differences(results):
        tables.append(("Nats per hard symbol less those of dense shallow with the same seed", *differences))
    if equal := _equal_steps(results):
        tables.append(("Right answers by steps of work at equal steps: those of the dense deep model", *equal))
    show_tables(tables, out / "results.md", console)
    last = {arm: [{**run, "curve": run["curve"][-1:]} for run in runs] for arm, runs in results.items()}
    (out / "results.json").write_text(json.dumps(last, indent=2) + "\n", encoding="utf-8")
    failed = try_to_draw(out / "accuracy.png", lambda: plot(results, out / "accuracy.png"))
    picture = "" if failed else f", picture: {out / 'accuracy.png'}"
    console.print(f"tables: {out / 'results.md'}{picture}", markup=False)


def file_name(arm: str) -> str:
    """What an arm's results are called, before the seed."""
    return arm.replace(", ", "_").replace(" ", "_")


def read(out: Path, arm: str) -> list[dict[str, Any]]:
    """Results of all seeds of an arm, by seed."""
    paths = sorted(out.glob(f"{file_name(arm)}-[0-9]*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _named(results: Results, rows: dict[str, list[str]]) -> list[list[str]]:
    """Rows of a table, which say where there are fewer seeds than elsewhere."""
    most = max(map(len, results.values()))
    names = {arm: arm if len(results[arm]) == most else f"{arm} (seeds: {len(results[arm])})" for arm in rows}
    return [[names[arm], *cells] for arm, cells in rows.items()]


def _rights(runs: list[dict[str, Any]], mode: str = "top_k") -> list[list[float]]:
    """Right answers by steps of work at the end, a row per seed."""
    return [run["curve"][-1][mode]["right"] for run in runs]


def _work(results: Results) -> list[str]:
    """Steps of work, as heads of a table."""
    runs = next(iter(results.values()))
    return [str(h) for h in range(FIRST, len(_rights(runs)[0]) + 1)]


def _accuracy(results: Results) -> tuple[list[str], list[list[str]]]:
    head = ["steps", *_work(results), "mean"]
    rows = {}
    for arm, runs in results.items():
        rights = np.array(_rights(runs))
        cells = [f"{value:.2f}" for value in rights.mean(0)[FIRST - 1 :]]
        rows[arm] = [f"{runs[0]['steps']:,}", *cells, spread(rights.mean(1).tolist(), "{:.3f}")]
    return ["", *head], _named(results, rows)


def _rest(results: Results) -> tuple[list[str], list[list[str]]]:
    groups = max(len(run["curve"][-1]["top_k"].get("hard_routed", ())) for runs in results.values() for run in runs)
    head = ["loss, as trained", "loss, causally", "right, causally"]
    head += [f"hard routed, block {2 * g + 2}" for g in range(groups)] + ["of causal"]
    rows = {}
    for arm, runs in results.items():
        ends = [run["curve"][-1] for run in runs]
        cells = [spread([end["top_k"]["loss"] for end in ends], "{:.3f}")]
        if "causal" in ends[0]:
            cells.append(spread([end["causal"]["loss"] for end in ends], "{:.3f}"))
            cells.append(spread([statistics.mean(each) for each in _rights(runs, "causal")], "{:.3f}"))
            shares = np.array([end["top_k"]["hard_routed"] for end in ends])
            cells += [spread(shares[:, g].tolist(), "{:.2f}") for g in range(groups)]
            cells.append(spread([statistics.mean(end["causal"]["hard_routed"]) for end in ends], "{:.2f}"))
        rows[arm] = cells + ["–"] * (len(head) - len(cells))
    return ["", *head], _named(results, rows)


def _differences(results: Results) -> tuple[list[str], list[list[str]]] | None:
    """Losses less those of the dense shallow model, seed by seed."""
    losses = {arm: {run["seed"]: run["curve"][-1]["top_k"]["loss"] for run in runs} for arm, runs in results.items()}
    base = losses.pop("dense shallow", {})
    if not base or not losses:
        return None
    rows = {}
    for arm, own in losses.items():
        less = {seed: own[seed] - base[seed] for seed in sorted(base) if seed in own}
        cells = [f"{less[seed]:+.3f}" if seed in less else "–" for seed in sorted(base)]
        rows[arm] = [*cells, spread(list(less.values()), "{:+.3f}") if less else "–"]
    return ["", *(f"seed {seed}" for seed in sorted(base)), "mean"], _named(results, rows)


def _equal_steps(results: Results) -> tuple[list[str], list[list[str]]] | None:
    """All arms after as many steps as the dense deep model has made."""
    if "dense deep" not in results:
        return None
    steps = results["dense deep"][0]["steps"]
    rows = {}
    for arm, runs in results.items():
        rights = [next(point["top_k"]["right"] for point in run["curve"] if point["step"] == steps) for run in runs]
        means = np.array(rights).mean(0)[FIRST - 1 :]
        rows[arm] = [*(f"{value:.2f}" for value in means), spread(np.array(rights).mean(1).tolist(), "{:.3f}")]
    return ["", *_work(results), "mean"], _named(results, rows)


@as_shipped
def plot(results: Results, path: Path) -> None:
    """Right answers by steps of work, means over seeds; each seed's loss against the hard symbols that are routed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (arm, runs) in enumerate(results.items()):
        dense = arm.startswith("dense")
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": arm}
        rights = np.array(_rights(runs))
        work = range(1, rights.shape[1] + 1)
        left.plot(work, rights.mean(0), linestyle="--" if dense else "-", marker="o", markersize=3, **look)
        ends = [run["curve"][-1]["top_k"] for run in runs]
        losses = [end["loss"] for end in ends]
        if dense:
            right.axhline(statistics.mean(losses), linestyle="--", linewidth=1, **look)
        else:
            shares = [statistics.mean(end["hard_routed"]) for end in ends]
            right.scatter(shares, losses, s=28, alpha=0.85, **look)
    left.set(xlabel="steps of work", ylabel="right answers", ylim=(0.25, 1.03), title="mean over seeds")
    left.axhline(1 / 3, color="0.6", linewidth=0.8)
    left.annotate("guessing", (1, 1 / 3), (0, 3), textcoords="offset points", fontsize=8, color="0.4")
    right.axvline(BY_CHANCE, color="0.6", linewidth=0.8)
    right.annotate("random", (BY_CHANCE, 0), (3, 3), textcoords="offset points", fontsize=8, color="0.4")
    right.set(
        xlabel="share of the hard symbols that routed blocks compute", ylabel="nats per hard symbol",
        xlim=(-0.03, 1.03), title="each seed; broken lines: dense, mean",
    )  # fmt: skip
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path)

"""Tables and picture of `experiments.quiet_star_smollm2`: expected probability and accuracy, with 95 % intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.support.reporting import markdown
from mod_star.evaluation.intervals import Estimate, paired_difference
from mod_star.evaluation.protocols import measures
from mod_star.runs.metrics import read_metrics
from mod_star.training.train import SUMMARY_FILE
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw
from mod_star.views.plots import COLOURS
from mod_star.views.terminal import result_table

TITLES = {"gsm8k": "GSM8K", "csqa": "CommonsenseQA"}
MEASURES = ("expected probability", "argmax", "greedy")
PAIRS = (
    ("before", "trained on"),
    ("before", "quiet-star, thinking"),
    ("trained on", "quiet-star, thinking"),
    ("trained on", "quiet-star"),
    ("quiet-star", "quiet-star, thinking"),
)
Records = list[dict[str, Any]]


def report(out: Path, files: dict[str, dict[str, Path]], console: Console) -> None:
    """Prints the tables, and writes them and the picture to `out`.

    Args:
      out: directory of the experiment.
      files: for each evaluation the records' file of each task; those not there or not complete are left out.
      console: to print on.
    """
    results = {
        name: {task: _read(path) for task, path in by_task.items() if path.is_file()} for name, by_task in files.items()
    }
    longest = max((len(records) for by_task in results.values() for records in by_task.values()), default=0)
    results = {
        name: {task: records for task, records in by_task.items() if len(records) == longest}
        for name, by_task in results.items()
    }
    tables = []
    for task, title in TITLES.items():
        by_name = {name: by_task[task] for name, by_task in results.items() if task in by_task}
        if not by_name:
            continue
        n = len(next(iter(by_name.values())))
        columns = [f"{title}, {n} questions", *MEASURES]
        shown = {name: measures(records) for name, records in by_name.items()}
        tables.append((columns, [[name, *(str(each[key]) for key in MEASURES)] for name, each in shown.items()]))
        rows = [
            [f"{second} less {first}", *(signed(differences(by_name[first], by_name[second], key)) for key in MEASURES)]
            for first, second in PAIRS
            if first in by_name and second in by_name
        ]
        if rows:
            tables.append(([f"{title}, paired differences in points", *MEASURES], rows))
    rows = [row for arm in ("trained_on", "quiet-star") if (row := _training(out, arm))]
    if rows:
        columns = ["training", "held-out, no thought", "a thought before every token", "mixing weight", "step, s"]
        tables.append((columns, rows))
    for columns, rows in tables:
        console.print(result_table("", columns, rows))
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text("\n".join(markdown(*table) for table in tables), encoding="utf-8")
    if tables:
        failed = try_to_draw(out / "results.png", lambda: plot(results, out, out / "results.png"))
        picture = "" if failed else f", picture: {out / 'results.png'}"
        console.print(f"tables: {out / 'results.md'}{picture}", markup=False, soft_wrap=True)


def _read(path: Path) -> Records:
    """Records in the order of their questions, whichever order they came in."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return sorted(map(json.loads, lines), key=lambda record: str(record["id"]))


def differences(first: Records, second: Records, key: str) -> Estimate:
    """second - first, question by question."""
    if [record["id"] for record in first] != [record["id"] for record in second]:
        raise ValueError("the two evaluations are of different questions")
    return paired_difference([float(r["scores"][key]) for r in first], [float(r["scores"][key]) for r in second])


def signed(estimate: Estimate) -> str:
    """In points of per cent: "+1.2 (-0.3 to +2.6)"."""
    return f"{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def _training(out: Path, arm: str) -> list[str] | None:
    """Held-out losses in nats per token, and what a step took."""
    path = out / arm / SUMMARY_FILE
    if not path.is_file():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    evaluation = summary["evaluation"]
    thinks = "eval_talk_loss" in evaluation
    return [
        arm.replace("_", " "),
        f"{evaluation['eval_base_loss' if thinks else 'eval_loss']:.4f}",
        f"{evaluation['eval_talk_loss']:.4f}" if thinks else "–",
        f"{evaluation['eval_mixing_weight']:.3f}" if thinks else "–",
        f"{summary['seconds'] / summary['steps']:.1f}",
    ]


@as_shipped
def plot(results: dict[str, dict[str, Records]], out: Path, path: Path) -> None:
    """Expected probabilities and accuracies with intervals; loss at the thinking positions by step of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for axis, (task, title) in zip(axes, TITLES.items(), strict=False):
        by_name = {name: by_task[task] for name, by_task in results.items() if task in by_task}
        for number, (name, records) in enumerate(by_name.items()):
            estimates = measures(records)
            shown = [estimates[key] for key in MEASURES]
            x = np.arange(len(shown)) + (number - (len(by_name) - 1) / 2) * 0.2
            values = np.array([100 * each.value for each in shown])
            low, high = (np.array([100 * getattr(each, end) for each in shown]) for end in ("low", "high"))
            axis.bar(x, values, 0.18, color=COLOURS[number], label=name)
            errors = np.maximum([values - low, high - values], 0)  # rounding makes a bound at 0 negative
            axis.errorbar(x, values, errors, fmt="none", ecolor="#222222", elinewidth=1)
        axis.set_xticks(range(len(MEASURES)), [name.replace(" ", "\n") for name in MEASURES])
        axis.set(title=title, ylabel="per cent, 95 % intervals")
        axis.set_ylim(0, 1.4 * axis.get_ylim()[1])  # room for the legend above the bars
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    records = [r for r in read_metrics(out / "quiet-star") if "talk_nll" in r] if (out / "quiet-star").is_dir() else []
    for number, (key, label) in enumerate((("base_nll", "without a thought"), ("talk_nll", "after a thought"))):
        if records:
            axes[2].plot([r["step"] for r in records], [r[key] for r in records], color=COLOURS[number], label=label)
    axes[2].set(
        title="Quiet-STaR: next token where it thinks", xlabel="step", ylabel="NLL in training, nats", ylim=(0, None)
    )
    if records:
        axes[2].legend(frameon=False, fontsize=8, loc="lower left")
        right = axes[2].twinx()
        right.plot([r["step"] for r in records], [r["mixing_weight"] for r in records], color="#8a8a8a", linewidth=1)
        right.set_ylabel("mixing weight of the thought (grey)")
    save_figure(figure, path, dpi=130)

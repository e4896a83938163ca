"""Tables and picture of what `experiments.support.paths` asked, from whatever records there are."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.support.reporting import markdown
from experiments.support.small_records import whole
from mod_star.decoding.branches import Branches
from mod_star.decoding.rankings import Ranking, softmax_weighted
from mod_star.evaluation.branch_records import branches_of
from mod_star.evaluation.discrimination import discrimination
from mod_star.evaluation.intervals import Estimate, accuracy, paired_difference
from mod_star.evaluation.records import RECORDS_FILE, write_json
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw
from mod_star.views.plots import COLOURS, GREY
from mod_star.views.terminal import result_table

KS = (1, 2, 5, 10)
# Whether a right answer is there to be chosen at all; texts cut by the limit can't be.
ANY, ANY_AT_ALL = "any of 10 {}", "any of 10 {}, dropped ones too"
TEMPERATURES = (1.0, 0.1)
"""Of softmax weights, CISC's T."""
HALF = 0.5
"""Share of the samples that vote if a ranking filters them."""
Method = Callable[[Branches, Branches], str | None]
Marks = dict[tuple[str, str], dict[str, list[float]]]
"""By task and prompt: for each method whether each question was answered rightly, 0 or 1."""


@dataclass(frozen=True)
class Report:
    """What a report is about."""

    name: str
    """Of the experiment's folder."""
    tasks: Mapping[str, str]
    """From the names of tasks in records to those in tables."""
    prompts: tuple[str, ...]
    """The wordings, as records and tables call them."""
    rankings: Mapping[str, Ranking]
    """By the names that tables know them by; Δ first. The records hold what they read."""
    weigh: bool = False
    """Also count votes that the rankings weigh or filter, and how well each tells right branches from wrong ones."""
    pool: bool = False
    """Also count the questions of all tasks together, and draw these alone."""

    def columns(self, marks: Marks, prompt: str) -> dict[str, dict[str, list[float]]]:
        """The marks under a prompt, by the titles of tasks; all together first if that is asked for."""
        parts = {title: marks[task, prompt] for task, title in self.tasks.items() if (task, prompt) in marks}
        if self.pool and parts:
            names = next(iter(parts.values()))
            together = {name: [mark for part in parts.values() for mark in part[name]] for name in names}
            parts = {ALL_TASKS: together} | parts
        return parts


def methods(about: Report) -> dict[str, Method]:
    """What each method answers, given branches and samples. A cut text still answers with its last number, alone."""
    by_name: dict[str, Method] = {
        GREEDY: lambda branches, samples: branches.branches[0].answer,
        TEMPERATURE: lambda branches, samples: samples.branches[0].answer,
        SELF_CONSISTENCY: lambda branches, samples: samples.majority_answer(),
    }
    for name, ranking in about.rankings.items():
        for aggregate in (False, True):
            for k in KS:
                by_name[cot(k, name, aggregate)] = _cot(k, ranking, aggregate)
        for T in TEMPERATURES if about.weigh else ():
            by_name[weighed(name, T)] = _weighed(softmax_weighted(ranking, T))
        if about.weigh:
            by_name[filtered(name)] = _filtered(ranking)
    return by_name


GREEDY, TEMPERATURE, SELF_CONSISTENCY = "greedy", "temperature 0.7", "self-consistency, 10"
ALL_TASKS, VOTES = "all tasks", "Votes"


def cot(k: int, ranking: str, aggregate: bool) -> str:
    """Name of a variant of CoT-decoding."""
    return f"CoT {'aggregated' if aggregate else 'max'}, {ranking}, k = {k}"


def weighed(ranking: str, temperature: float) -> str:
    """Name of self-consistency with softmax weights."""
    return f"{SELF_CONSISTENCY}, weighed by {ranking}, T = {temperature:g}"


def filtered(ranking: str) -> str:
    """Name of self-consistency among the samples that rank highest."""
    return f"{SELF_CONSISTENCY}, best half by {ranking}"


def _cot(k: int, ranking: Ranking, aggregate: bool) -> Method:
    return lambda branches, samples: branches.first(k).answer(ranking, aggregate)


def _weighed(ranking: Ranking) -> Method:
    return lambda branches, samples: samples.answer(ranking, aggregate=True)


def _filtered(ranking: Ranking) -> Method:
    return lambda branches, samples: samples.keep(HALF, ranking).majority_answer()


def read(out: Path, about: Report) -> tuple[Marks, list[dict[str, Any]]]:
    """The marks of every method, and the records."""
    records = []
    path = out / RECORDS_FILE
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        try:
            records.append(whole(json.loads(line)))
        except ValueError:  # blank, or half written
            continue
    marks: Marks = {}
    all_methods = methods(about)
    for record in records:
        part = marks.setdefault((record["task"], record["prompt"]), {name: [] for name in all_methods})
        branches, samples = branches_of(record["branches"]), branches_of(record["samples"])
        for name, method in all_methods.items():
            part[name].append(float(method(branches, samples) == record["gold"]))
        for name, rows in (("branches", branches), ("samples", samples)):
            right = [row for row in rows.branches if row.answer == record["gold"]]
            part.setdefault(ANY.format(name), []).append(float(any(row.dropped is None for row in right)))
            part.setdefault(ANY_AT_ALL.format(name), []).append(float(bool(right)))
    return marks, records


def report(out: Path, console: Console, about: Report, into: Path | None = None) -> None:
    """Prints what there is, and writes tables, results and a picture.

    Args:
      out: the directory of the records.
      console: gets the tables.
      about: what the report is about.
      into: the directory to write into, made if absent; None: `out`.
    """
    marks, answered = read(out, about)
    if not answered:
        console.print(f"{out}: nothing to report yet", markup=False)
        return
    out = out if into is None else into
    out.mkdir(parents=True, exist_ok=True)
    text = ""
    for prompt in about.prompts:
        parts = about.columns(marks, prompt)
        if not parts:
            continue
        head = ["", *(f"{title} (n = {len(part[GREEDY])})" for title, part in parts.items())]
        for title, names in _tables(about).items():
            body = [[name, *(cell(accuracy([x > 0 for x in part[name]])) for part in parts.values())] for name in names]
            text += _show(f"{title}, prompt {prompt}; right in %, 95 % interval", head, body, console)
        gain = [
            [f"{name} less {other}", *(cell(paired_difference(part[other], part[name])) for part in parts.values())]
            for name, other in _differences(about)
        ]
        text += _show(f"Differences, prompt {prompt}; paired, in points", head, gain, console)
    if about.pool:
        text = _show("All tasks by prompt; right in %, 95 % interval", *overview(marks, about), console) + text
    if about.weigh:
        text += _show("Pairs of branches whose right one ranks higher, in %", *_told(answered, about), console)
    text += _show("What was generated", *_generated(answered, about), console)
    (out / "results.md").write_text(text, encoding="utf-8")
    if read_by_people := _side_by_side(answered):
        (out / "texts.md").write_text(read_by_people, encoding="utf-8")
    estimates = {
        f"{task}, {prompt}": {name: accuracy([x > 0 for x in values]).__dict__ for name, values in part.items()}
        for (task, prompt), part in marks.items()
    }
    write_json(out / "results.json", estimates)
    path = out / f"{about.name}.png"
    drawn = f", picture: {path}" if try_to_draw(path, functools.partial(plot, marks, path, about)) is None else ""
    console.print(f"tables: {out / 'results.md'}{drawn}", markup=False, soft_wrap=True)


def overview(marks: Marks, about: Report) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table: what each method gets right of all tasks together, by prompt."""
    together = {prompt: about.columns(marks, prompt).get(ALL_TASKS) for prompt in about.prompts}
    columns = {prompt: part for prompt, part in together.items() if part is not None}
    names = [name for title, names in _tables(about).items() if title != VOTES for name in names]
    rows = [
        [name, *(cell(accuracy([x > 0 for x in part[name]])) for part in columns.values())]
        for name in dict.fromkeys(names)
    ]
    return ["", *(f"{prompt} (n = {len(part[GREEDY])})" for prompt, part in columns.items())], rows


def _side_by_side(records: list[dict[str, Any]]) -> str:
    """The texts that records hold, for reading: question, greedy decoding, CoT-decoding; answers and the right one."""
    parts = []
    for record in records:
        if "texts" in record:
            branches = branches_of(record["branches"])
            best = branches.max_path()
            assert best is not None
            answers = (
                f"right {record['gold']}, greedy {branches.branches[0].answer}, CoT {branches.branches[best].answer}"
            )
            texts = "".join(f"**{name}**\n\n{text.strip()}\n\n" for name, text in record["texts"].items())
            parts.append(
                f"## {record['id']}: {answers} (branch {best}, Δ {branches.branches[best].delta:.3f})\n\n{texts}"
            )
    return "".join(parts)


def _differences(about: Report) -> list[tuple[str, str]]:
    """Which methods are compared, the second taken from the first, question by question."""
    best, aggregated = cot(10, "Δ", False), cot(10, "Δ", True)
    pairs = [(name, GREEDY) for name in (aggregated, best, SELF_CONSISTENCY)]
    if about.weigh:
        others = [cot(10, name, aggregate) for aggregate in (False, True) for name in about.rankings if name != "Δ"]
        pairs += [(name, GREEDY) for name in (TEMPERATURE, *others)]
        pairs += [(aggregated, SELF_CONSISTENCY)]
        pairs += [(weighed(name, T), SELF_CONSISTENCY) for name in about.rankings for T in TEMPERATURES]
    return pairs


def _tables(about: Report) -> dict[str, list[str]]:
    delta = [cot(k, "Δ", aggregate) for aggregate in (False, True) for k in KS]
    rankings = [cot(10, ranking, aggregate) for aggregate in (False, True) for ranking in about.rankings]
    bounds = [name.format(rows) for rows in ("branches", "samples") for name in (ANY, ANY_AT_ALL)]
    tables = {
        "Methods": [GREEDY, TEMPERATURE, SELF_CONSISTENCY, *delta],
        "Rankings": [*rankings, *bounds],
    }
    if about.weigh:
        votes = [
            name
            for ranking in about.rankings
            for name in (*(weighed(ranking, T) for T in TEMPERATURES), filtered(ranking))
        ]
        tables[VOTES] = [SELF_CONSISTENCY, *votes]
    return tables


def _told(records: list[dict[str, Any]], about: Report) -> tuple[list[str], list[list[str]]]:
    """Within-question discrimination of the rankings among branches, by task and prompt; 50 % is chance."""
    head, columns = [""], []
    groups = [({*about.tasks}, ALL_TASKS)] if about.pool else [({task}, title) for task, title in about.tasks.items()]
    for prompt in about.prompts:
        for tasks, title in groups:
            estimates = discrimination([each for each in records if each["prompt"] == prompt and each["task"] in tasks])
            if estimates:
                head.append(f"{title}, {prompt} (n = {next(iter(estimates.values())).n})")
                columns.append(estimates)
    return head, [[name, *(cell(column[name]) for column in columns)] for name in about.rankings]


def cell(estimate: Estimate) -> str:
    """ "12.0 (8.2–17.2)", in per cent."""
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _generated(records: list[dict[str, Any]], about: Report) -> tuple[list[str], list[list[str]]]:
    """How long branches and samples are, and how many were dropped."""
    body = []
    for task, name in about.tasks.items():
        for prompt in about.prompts:
            for kind in ("branches", "samples"):
                answered = [record for record in records if (record["task"], record["prompt"]) == (task, prompt)]
                rows = [row for record in answered for row in record[kind]]
                if not rows:
                    continue
                share = lambda condition, rows=rows: f"{100 * sum(map(condition, rows)) / len(rows):.1f} %"  # noqa: E731
                body.append(
                    [
                        f"{name}, {prompt}, {kind}",
                        f"{sum(row['tokens'] for row in rows) / len(rows):.0f}",
                        share(lambda row: row["finished"] == "length"),
                        share(lambda row: row["dropped"] is not None),
                        f"{sum(record['seconds'] for record in answered) / len(answered):.1f}",
                    ]
                )
    return ["", "tokens", "cut by the limit", "dropped in all", "s per question (both)"], body


def _show(title: str, head: list[str], body: list[list[str]], console: Console) -> str:
    """Prints a table, and returns it in Markdown."""
    console.print(f"\n{title}", style="bold")
    console.print(result_table("", head, body))
    return f"{title}:\n\n{markdown(head, body)}\n"


@as_shipped
def plot(marks: Marks, path: Path, about: Report) -> None:
    """Accuracy by k, one panel per prompt, and per task unless they are pooled."""
    from matplotlib.figure import Figure

    columns = (ALL_TASKS,) if about.pool else tuple(about.tasks.values())
    asked = {prompt for _, prompt in marks}
    panels = [(prompt, title) for prompt in about.prompts if prompt in asked for title in columns]
    width = 2 if about.pool else len(columns)
    height = -(-len(panels) // width)
    figure = Figure(figsize=(1.0 + 3.3 * width, 1.2 + 2.5 * height))
    axes = figure.subplots(height, width, sharex=True, sharey="all" if about.pool else "col", squeeze=False)
    lines = [
        ("CoT aggregated, Δ", COLOURS[0], "-", "Δ", True),
        ("CoT max, Δ", COLOURS[1], "-", "Δ", False),
        ("CoT max, log-prob", COLOURS[2], "--", "log-prob", False),
        ("CoT max, log-prob per token", COLOURS[3], "--", "log-prob per token", False),
    ]
    for number, (prompt, title) in enumerate(panels):
        row, column = divmod(number, width)
        panel = axes[row][column]
        panel.set_title(f"{title}, {prompt}")
        panel.set_xticks(KS)
        part = about.columns(marks, prompt).get(title)
        if part is None:
            continue
        for index, (label, colour, style, ranking, aggregate) in enumerate(lines):
            estimates = [accuracy([x > 0 for x in part[cot(k, ranking, aggregate)]]) for k in KS]  # type: ignore[arg-type]
            value = [100 * each.value for each in estimates]
            low = [100 * (each.value - each.low) for each in estimates]
            high = [100 * (each.high - each.value) for each in estimates]
            bars = [low, high] if ranking == "Δ" else None
            places = [k + 0.12 * (index - 0.5) for k in KS]
            panel.errorbar(places, value, bars, color=colour, linestyle=style, marker="o", markersize=3, label=label)
        for name, style in ((GREEDY, "-"), (SELF_CONSISTENCY, ":")):
            level = 100 * sum(part[name]) / len(part[name])
            panel.axhline(level, color=GREY, linestyle=style, linewidth=1.2, label=name)
        panel.spines[["top", "right"]].set_visible(False)
        if row == height - 1:
            panel.set_xlabel("branches k")
        if column == 0:
            panel.set_ylabel("right, %")
    for panel in axes.flat:  # when all have been drawn: panels that share a scale would keep that of the first
        panel.set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, max(0.09, 0.5 / figure.get_figheight()), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=130)

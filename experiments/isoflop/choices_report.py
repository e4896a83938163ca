"""Tables and picture of `experiments.isoflop.choices`: shares of routed blocks that tokens use, with intervals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.console import Console

from experiments.support.reporting import Table, show_tables
from mod_star.evaluation.intervals import Estimate, mean, ratio
from mod_star.model.routing import RoutingMode
from mod_star.views.pictures import as_shipped, save_figure, try_to_draw
from mod_star.views.plots import COLOURS, DPI, GREY, PALE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("digits", "answer", "white space", "signs", "words", "others")
"""digits: digits alone. answer: all after ####. signs: no letter or digit. words: letters alone. others: mixed."""
STEPS = {"1 or 2": (1, 2), "3": (3, 3), "4": (4, 4), "5 or more": (5, 99)}
"""Groups of questions by calculations of their solutions."""
BINS = 5
"""Of the entropy, with as many tokens each."""
NAMES: dict[RoutingMode, str] = {"top_k": "top-k", "causal": "causal rule"}


@dataclass(frozen=True)
class Document:
    """A question with its solution, N tokens, bos included."""

    ids: list[int]
    kinds: list[str]
    """Of each token, one of `KINDS`."""
    prompt: int
    """Tokens of the prompt, up to the solution."""
    steps: int
    """Calculations of the solution: how often it says <<."""


@dataclass(frozen=True)
class Seen:
    """What a model did with a document."""

    document: Document
    routed_LxN: npt.NDArray[np.bool_]
    """[l, n]: whether routed block l computed token n."""
    entropy_N: npt.NDArray[np.float32]
    """Of the prediction that is made at each token, in nats."""

    @property
    def share_N(self) -> npt.NDArray[np.float64]:
        """Share of the routed blocks that computed each token."""
        return np.asarray(self.routed_LxN.mean(0, dtype=np.float64))


ByMode = Mapping[RoutingMode, Sequence[Seen]]


def share_where(seen: Sequence[Seen], chosen: Callable[[Seen], npt.NDArray[np.bool_]]) -> Estimate | None:
    """Share of routed blocks that the tokens use for which `chosen` is True; None where there are none.

    All tokens count the same; the interval is bootstrapped over documents.
    """
    masks = [chosen(each) for each in seen]
    pairs = [(each.share_N[mask].sum(), mask.sum()) for each, mask in zip(seen, masks, strict=True) if mask.any()]
    return ratio([routed for routed, _ in pairs], [count for _, count in pairs]) if pairs else None


def entropy_edges(seen: Sequence[Seen]) -> npt.NDArray[np.float64]:
    """Bounds of `BINS` bins with as many tokens each; the last token of a document predicts nothing and is left out."""
    entropy = np.concatenate([each.entropy_N[:-1] for each in seen])
    return np.asarray(np.quantile(entropy, np.linspace(0, 1, BINS + 1)), np.float64)


def by_entropy(seen: Sequence[Seen], edges: npt.NDArray[np.float64]) -> list[Estimate | None]:
    """Shares by bin of the entropy of the prediction that is made at a token."""

    def in_bin(number: int) -> Callable[[Seen], npt.NDArray[np.bool_]]:
        def chosen(each: Seen) -> npt.NDArray[np.bool_]:
            mask = np.searchsorted(edges[1:-1], each.entropy_N, side="right") == number
            mask[-1] = False
            return np.asarray(mask)

        return chosen

    return [share_where(seen, in_bin(number)) for number in range(len(edges) - 1)]


def by_kind(seen: Sequence[Seen], following: bool = False) -> list[Estimate | None]:
    """Shares by kind of the token that is read, or of the one that follows it and is to be predicted."""

    def of_kind(kind: str) -> Callable[[Seen], npt.NDArray[np.bool_]]:
        def chosen(each: Seen) -> npt.NDArray[np.bool_]:
            kinds = [*each.document.kinds[1:], ""] if following else each.document.kinds
            return np.array([own == kind for own in kinds])

        return chosen

    return [share_where(seen, of_kind(kind)) for kind in KINDS]


def prompt_shares(seen: Sequence[Seen]) -> list[float]:
    """Of each document the share of routed blocks that its prompt's tokens use, on average."""
    return [float(each.share_N[: each.document.prompt].mean()) for each in seen]


def solution_shares(seen: Sequence[Seen]) -> list[float]:
    """Of each document the share of routed blocks that its solution's tokens use, on average."""
    return [float(each.share_N[each.document.prompt :].mean()) for each in seen]


def beyond_kinds(seen: Sequence[Seen]) -> list[float]:
    """Of each document its prompt's share less what tokens of the same kinds get in the prompts of all documents."""
    prompts = [(each.document.kinds[: each.document.prompt], each.share_N[: each.document.prompt]) for each in seen]
    of_all: dict[str, list[float]] = {}
    for kinds, shares in prompts:
        for kind, share in zip(kinds, shares, strict=True):
            of_all.setdefault(kind, []).append(share)
    usual = {kind: np.mean(shares) for kind, shares in of_all.items()}
    return [float(np.mean(shares) - np.mean([usual[kind] for kind in kinds])) for kinds, shares in prompts]


def by_steps(seen: Sequence[Seen], values: Sequence[float]) -> list[Estimate | None]:
    """Mean of a value per document over the questions of each group of `STEPS`."""
    groups = [
        [value for each, value in zip(seen, values, strict=True) if low <= each.document.steps <= high]
        for low, high in STEPS.values()
    ]
    return [mean(group) if group else None for group in groups]


def report(by_mode: ByMode, out: Path, console: Console) -> None:
    """Prints the tables, and writes choices.md and choices.png into a directory."""
    out.mkdir(parents=True, exist_ok=True)
    show_tables([entropy_table(by_mode), kinds_table(by_mode), steps_table(by_mode)], out / "choices.md", console)
    path = out / "choices.png"
    if try_to_draw(path, lambda: plot(by_mode, path)) is None:
        console.print(f"picture: {path}", markup=False)


def entropy_table(by_mode: ByMode) -> Table:
    """Shares by entropy of the prediction, in bins of as many tokens each under the causal rule."""
    edges = entropy_edges(by_mode["causal"])
    columns = [[_shown(value) for value in by_entropy(by_mode[mode], edges)] for mode in NAMES]
    rows = [list(row) for row in zip(entropy_names(edges), *columns, strict=True)]
    return "Share of routed blocks used, by entropy of the prediction", ["nats", *NAMES.values()], rows


def entropy_names(edges: npt.NDArray[np.float64]) -> list[str]:
    """What the bins are called."""
    return [f"{low:.2f} to {high:.2f}" for low, high in itertools.pairwise(edges)]


def kinds_table(by_mode: ByMode) -> Table:
    """Shares by kind of token."""
    kinds = [kind for each in by_mode["causal"] for kind in each.document.kinds]
    head = ["", "of all tokens", *NAMES.values(), "causal rule, by the next token's kind"]
    columns = [[_shown(value) for value in by_kind(by_mode[mode])] for mode in NAMES]
    columns.append([_shown(value) for value in by_kind(by_mode["causal"], following=True)])
    counts = [f"{100 * kinds.count(kind) / len(kinds):.1f} %" for kind in KINDS]
    rows = [list(row) for row in zip(KINDS, counts, *columns, strict=True)]
    return "Share of routed blocks used, by kind of the token that is read", head, rows


def steps_table(by_mode: ByMode) -> Table:
    """Shares by calculations of the solution."""
    causal = by_mode["causal"]
    counts = [sum(low <= each.document.steps <= high for each in causal) for low, high in STEPS.values()]
    columns = [
        by_steps(causal, prompt_shares(causal)),
        by_steps(by_mode["top_k"], prompt_shares(by_mode["top_k"])),
        by_steps(causal, solution_shares(causal)),
    ]
    beyond = by_steps(causal, beyond_kinds(causal))
    rows = [
        [name, str(count), *(_shown(value) for value in shares), _points(more)]
        for name, count, shares, more in zip(STEPS, counts, zip(*columns, strict=True), beyond, strict=True)
    ]
    head = ["steps", "questions", "prompt, causal rule", "prompt, top-k", "solution, causal rule"]
    head.append("prompt, causal rule, beyond kinds of tokens")
    return "Share of routed blocks used by a question, by steps of its solution", head, rows


def _shown(value: Estimate | None) -> str:
    return "–" if value is None else str(value)


def _points(value: Estimate | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value.value:+.2f} ({100 * value.low:+.2f} to {100 * value.high:+.2f})"


@as_shipped
def plot(by_mode: ByMode, path: Path) -> None:
    """Draws the shares by entropy, by kind of token and by steps, with their intervals."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    edges = entropy_edges(by_mode["causal"])
    panels = {
        "entropy of the prediction (nats)": (entropy_names(edges), lambda seen: by_entropy(seen, edges)),
        "kind of the token read": (list(KINDS), by_kind),
        "steps of the solution (prompt alone)": (list(STEPS), lambda seen: by_steps(seen, prompt_shares(seen))),
    }
    figure = Figure(figsize=(12.5, 4.2), dpi=DPI, layout="constrained")
    for axes, (title, (names, shares)) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        for colour, shift, (mode, label) in zip(COLOURS, (-0.12, 0.12), NAMES.items(), strict=False):
            _errorbars(axes, shares(by_mode[mode]), shift, colour, label)
        overall = share_where(by_mode["causal"], lambda each: np.ones(len(each.entropy_N), bool))
        if overall is not None:
            axes.axhline(overall.value, color=GREY, linewidth=0.9, linestyle=":", label="all tokens, causal rule")
        axes.set_xticks(range(len(names)), names, rotation=25, ha="right")
        axes.set_xlabel(title)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(color=PALE, linewidth=0.8, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of routed blocks used")
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False)
    save_figure(figure, path)


def _errorbars(axes: Axes, values: Sequence[Estimate | None], shift: float, colour: str, label: str) -> None:
    known = [(x + shift, value) for x, value in enumerate(values) if value is not None]
    axes.errorbar(
        [x for x, _ in known],
        [value.value for _, value in known],
        yerr=np.array([(value.value - value.low, value.high - value.value) for _, value in known]).T,
        fmt="o", color=colour, capsize=3, label=label,
    )  # fmt: skip

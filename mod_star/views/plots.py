"""The pictures of a run: loss curves, and which tokens each routed block computed.

matplotlib is imported when a picture is drawn, not before; see `mod_star.views.pictures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mod_star.runs.metrics import read_metrics
from mod_star.views.pictures import as_shipped, save_figure
from mod_star.views.terminal import check_routes, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, told apart by colour-blind readers too; black and yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GREY, PALE = "#222222", "#8a8a8a", "#eceff3"
DPI = 150
THIN: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.4}
SOLID: dict[str, Any] = {"linewidth": 1.8}
DASHED: dict[str, Any] = {"linewidth": 1.6, "linestyle": (0, (3, 1.6))}
DOTTED: dict[str, Any] = {"linewidth": 1.2, "linestyle": ":"}
SECOND = {
    "eval_loss_causal": ("causal", "held out, routed as in training", "held out, routed causally"),
    "eval_base_loss": ("without thoughts", "held out, with thoughts", "held out, without thoughts"),
}
"""Held-out losses that are drawn dashed: what the label calls them, and what solid and dashed then mean."""


@as_shipped
def plot_curves(
    runs: Mapping[str, str | Path | Records],
    path: str | Path,
    *,
    against: Literal["step", "train_flops"] = "step",
    title: str = "",
) -> None:
    """Draws the training of one or several runs into a PNG (or whatever `path` ends with).

    Above: loss of the training batches (thin), held-out loss (solid) and, dashed, under causal routing or, of a model
    that thinks, without thoughts. Below, if any run has a predictor: how often it is right, and how often one would be
    that always gave the commoner answer (dotted).

    Args:
      runs: label -> directory of a run, or its records as `read_metrics` gives them.
      path: the picture's file; its directory is made if absent.
      against: what stands on the x axis, optimizer steps or floating-point operations spent on training.
      title: a line above.

    Raises:
      InputError: a directory holds no metrics.
      ValueError: no run is given, or there is no loss in a run's records.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    if not runs:
        raise ValueError("plot_curves needs at least one run")
    loaded = {name: read_metrics(run) if isinstance(run, str | Path) else run for name, run in runs.items()}
    with_predictor = any(_series(records, "predictor_accuracy", against)[0].size for records in loaded.values())
    figure = Figure(figsize=(8.5, 7.0 if with_predictor else 5.0), dpi=DPI, layout="constrained")
    all_axes = figure.subplots(
        2 if with_predictor else 1, 1, sharex=True, squeeze=False, height_ratios=(5, 2) if with_predictor else (1,)
    )[:, 0]
    loss_axes = all_axes[0]
    highest = 0.0
    names: list[str] = []
    for index, (name, records) in enumerate(loaded.items()):
        colour = COLOURS[index % len(COLOURS)]
        top, label = _draw_losses(loss_axes, name, records, against, colour)
        highest = max(highest, top)
        names.append(_drawable(label, "DejaVu Sans"))
        if with_predictor:
            _draw_accuracy(all_axes[1], records, against, colour)
    # The first steps, far above everything that follows, would press the curves flat: they may leave the picture.
    loss_axes.set_ylim(top=highest + 0.04 * (highest - loss_axes.get_ylim()[0]))
    loss_axes.set_ylabel("loss (nats per token)")
    evaluated = any(_series(records, "eval_loss", against)[0].size for records in loaded.values())
    heading = "held-out loss at the end" if evaluated else None
    legend = loss_axes.legend(loc="upper right", title=heading, frameon=False, alignment="left")
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)
    loss_axes.add_artist(legend)  # a second legend would replace it
    styles = {"training batches": THIN}
    for name, (_, solid, dashed) in SECOND.items():
        if any(_series(records, name, against)[0].size for records in loaded.values()):
            styles |= {solid: SOLID, dashed: DASHED}
    _style_legend(loss_axes, "lower left", styles if len(styles) > 1 else styles | {"held out": SOLID})
    if with_predictor:
        _style_legend(
            all_axes[1],
            "lower right",
            {"training batches": THIN, "held out": SOLID, "always the commoner answer": DOTTED},
        )
        all_axes[1].set_ylabel("predictor accuracy")
        all_axes[1].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    for axes in all_axes:
        axes.grid(color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    if against == "train_flops":
        all_axes[-1].xaxis.set_major_formatter(EngFormatter(unit="FLOP"))
        all_axes[-1].set_xlabel("training compute")
    else:
        all_axes[-1].set_xlabel("step")
    if title:
        loss_axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    save_figure(figure, path)


@as_shipped
def plot_routes(
    path: str | Path,
    tokens: Sequence[str],
    routed_LxN: npt.ArrayLike,
    block_names: Sequence[str],
    *,
    title: str = "Which tokens each routed block computed",
    characters_per_line: int = 96,
) -> None:
    """Draws a text and, under every token, one cell per routed block: filled if the block computed the token.

    Long texts are wrapped over several lines. Newlines and other control characters are shown as signs.

    Args:
      path: the picture's file; its directory is made if absent.
      tokens: N pieces of text.
      routed_LxN: bool; [l, n] is True if routed block l computed token n.
      block_names: L names, for the left margin.
      title: a line above.
      characters_per_line: where lines wrap; a longer token is cut.

    Raises:
      ValueError: the shapes don't fit.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    routed = check_routes(tokens, routed_LxN, block_names)
    L = routed.shape[0]
    shown = [_drawable(visible(token)) or "∅" for token in tokens]
    shown = [text if len(text) <= characters_per_line else text[: characters_per_line - 1] + "…" for text in shown]
    lines = _wrap([len(text) for text in shown], characters_per_line)

    # Units: a character is 1 wide; text is 1.7 high, a block's row of cells 1, the gap between lines 1.4.
    text_height, gap = 1.7, 1.4
    line_height = text_height + L + gap
    labels = [f"{name}  {row.mean():.1%}" for name, row in zip(block_names, routed, strict=True)]
    left = max(len(label) for label in labels) * 0.56 + 3
    right = max(62, max(sum(len(text) for text in shown[first:last]) for first, last in lines)) + 1
    width, height = left + right, len(lines) * line_height + 4.6
    inch = 0.105  # of one unit
    figure = Figure(figsize=(width * inch, height * inch * 1.25), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-left, right), ylim=(height, 0))
    axes.set_axis_off()
    axes.text(-left + 1, 1.5, title, fontsize=11, fontweight="bold", color=INK, va="center")
    mono: dict[str, Any] = {"family": "DejaVu Sans Mono", "parse_math": False, "va": "center"}
    filled: list[list[tuple[float, float]]] = []
    empty: list[list[tuple[float, float]]] = []
    top = 3.2
    for first, last in lines:
        for label, row in zip(labels, range(L), strict=True):
            axes.text(-1, top + text_height + row + 0.5, label, ha="right", fontsize=7, color=INK, **mono)
        x = 0.0
        for n in range(first, last):
            cell = len(shown[n])
            computed_by = int(routed[:, n].sum())
            ink: dict[str, Any] = {"color": INK, "fontweight": "bold"} if computed_by else {"color": GREY}
            axes.text(x + cell / 2, top + text_height / 2, shown[n], ha="center", fontsize=10, **ink, **mono)
            for row in range(L):
                y, edge = top + text_height + row, 0.09
                corners = [(x + edge, y + edge), (x + cell - edge, y + edge)]
                corners += [(x + cell - edge, y + 1 - edge), (x + edge, y + 1 - edge)]
                (filled if routed[row, n] else empty).append(corners)
            x += cell
        top += line_height
    axes.add_collection(PolyCollection(empty, facecolor=PALE, linewidth=0))
    axes.add_collection(PolyCollection(filled, facecolor=COLOURS[0], linewidth=0))
    _routes_legend(axes, top - gap + 1.2)
    save_figure(figure, path)


def _series(records: Records, name: str, against: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(x, y) of the records that have the value; a per-layer list counts as its mean, a non-finite value as absent."""
    flops = _flops_by_step(records) if against == "train_flops" else {}
    points = [
        (flops[record["step"]] if against == "train_flops" else record["step"], float(np.mean(record[name])))
        for record in records
        if name in record and (against != "train_flops" or record["step"] in flops)
    ]
    array = np.array([point for point in points if np.all(np.isfinite(point))], dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _flops_by_step(records: Records) -> dict[int, float]:
    """Training FLOPs at every step that has a record. Steps in between cost the same: in proportion."""
    known = [(record["step"], float(record["train_flops"])) for record in records if "train_flops" in record]
    if not known:
        return {}
    steps, flops = zip(*sorted([(0, 0.0), *known]), strict=True)
    return {record["step"]: _extended(record["step"], steps, flops) for record in records}


def _extended(step: int, steps: Sequence[int], flops: Sequence[float]) -> float:
    """Linear interpolation, continued at the same rate after the last known step."""
    return float(np.interp(step, steps, flops)) if step <= steps[-1] else step * flops[-1] / steps[-1]


def _draw_losses(axes: Axes, name: str, records: Records, against: str, colour: str) -> tuple[float, str]:
    """Draws a run's curves; gives the highest loss that must stay in the picture, and what the legend says."""
    x, loss = _series(records, "lm_loss", against)
    if not x.size:
        x, loss = _series(records, "loss", against)
    held_x, held = _series(records, "eval_loss", against)
    if not x.size and not held_x.size:
        raise ValueError(f"the records of {name!r} hold no loss")
    label = f"{name}: {held[-1]:.3f}" if held.size else name
    highest = [*held[1:]] if held.size > 1 else [*held]
    for second, (what, _, _) in SECOND.items():
        second_x, values = _series(records, second, against)
        axes.plot(second_x, values, color=colour, **DASHED)
        label += f", {what} {values[-1]:.3f}" if values.size else ""
        highest += [*values[1:]]
    axes.plot(x, loss, color=colour, **THIN)
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.2} if held_x.size < 40 else {}
    axes.plot(held_x, held, color=colour, label="run", **SOLID, **marker)
    settled = loss[x >= x[0] + 0.05 * (x[-1] - x[0])] if x.size else loss
    return float(max((*settled, *highest), default=0.0)), label


def _draw_accuracy(axes: Axes, records: Records, against: str, colour: str) -> None:
    x, accuracy = _series(records, "predictor_accuracy", against)
    axes.plot(x, accuracy, color=colour, **THIN)
    x, accuracy = _series(records, "eval_predictor_accuracy", against)
    axes.plot(x, accuracy, color=colour, **SOLID)
    # A predictor that always gave the commoner of the two answers would be right this often.
    # While a model learns to think, its text is routed causally: the routed share is not that of the answers then.
    x, routed = _series([record for record in records if "talk_nll" not in record], "routed_fraction", against)
    axes.plot(x, np.maximum(routed, 1 - routed), color=colour, **DOTTED)


def _style_legend(
    axes: Axes, loc: Literal["lower left", "lower right"], styles: Mapping[str, Mapping[str, Any]]
) -> None:
    """A legend that says what the line styles mean, in grey: colours name the runs."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=GREY, label=label, **style) for label, style in styles.items()]
    axes.legend(handles=handles, loc=loc, frameon=False, fontsize=9)


def _wrap(widths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """(first, one past last) token of every line no wider than `limit`."""
    lines, first, used = [], 0, 0
    for n, width in enumerate(widths):
        if used + width > limit and n > first:
            lines.append((first, n))
            first, used = n, 0
        used += width
    return [*lines, (first, len(widths))]


def _drawable(text: str, family: str = "DejaVu Sans Mono") -> str:
    """The text with □ for every character that the font has no sign for."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(family))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in text)


def _routes_legend(axes: Axes, y: float) -> None:
    from matplotlib.patches import Rectangle

    for x, colour, meaning in (
        (0, COLOURS[0], "computed by the block"),
        (27, PALE, "passed by on the residual stream"),
    ):
        axes.add_patch(Rectangle((x, y - 0.45), 2, 0.9, facecolor=colour, linewidth=0))
        axes.text(x + 2.8, y, meaning, fontsize=8, color=INK, va="center")

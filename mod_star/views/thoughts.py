"""What a thinking model made of a text: every token coloured by what the thought before it changed.

`thoughts_text` is for a terminal, `thoughts_html` is a page of its own. JAX is not needed for either.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.color import Color
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mod_star.views.terminal import result_table, visible

Numbers = np.ma.MaskedArray[Any, np.dtype[np.float64]]
Floats = Sequence[float | None] | npt.NDArray[np.floating] | Numbers

# From a weak colour to a full one, for a loss and for a gain. Brown and blue are told apart by colour-blind readers
# too. White ink is readable on all of it; that it starts near a middle grey suits light terminals as well as dark ones.
HURT = ((122, 106, 96), (168, 70, 0))
HELPED = ((96, 106, 122), (0, 92, 184))
NEUTRAL = 0.1  # up to this share of the scale, a gain counts as none
PERCENTILE = 98  # of the sizes: a few outliers would leave the rest of the text pale
LEAST_SCALE = 0.01
LONGEST_CELL = 48  # characters of a thought in the terminal's table
TEMPLATE = "thoughts_view.html"


@dataclass(frozen=True)
class TextThoughts:
    """A text of N tokens, the thoughts before them and what these changed. None stands for a value that there is not.

    Raises:
      ValueError: there is no token, the lengths differ, or a number is not finite.
    """

    tokens: list[str]
    """N pieces of text, bos first; joined they are the text."""
    base_log_probs: Floats
    """N: log-probability of each token without a thought, in nats; None for the first."""
    talk_log_probs: Floats
    """N: the same, mixed with the prediction after a thought; None where there was no thought."""
    thoughts: list[str]
    """N: the thought before each token; "" where there was none."""
    thought_tokens: list[list[str]]
    """N: the pieces of each thought."""
    weights: Floats
    """N: the weight of the thought's prediction in the mixture, not always within [0, 1]; None where there is none."""
    entropies: Floats
    """N: entropy of the prediction without a thought, in nats; None for the first."""

    def __post_init__(self) -> None:
        N = len(self.tokens)
        if N == 0:
            raise ValueError("tokens is empty: there must be at least 1")
        for name in ("thoughts", "thought_tokens"):
            if len(getattr(self, name)) != N:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, but there are {N} tokens")
        for name in ("base_log_probs", "talk_log_probs", "weights", "entropies"):
            values = _array(getattr(self, name))
            if values.shape != (N,):
                raise ValueError(f"{name} has shape {values.shape}, but there are {N} tokens")
            if not np.isfinite(values.compressed()).all():
                raise ValueError(f"{name} holds a number that is not finite; None stands for none")

    @property
    def gains(self) -> Numbers:
        """N: talk - base in nats. Positive: the thought made the token likelier. Masked where there was no thought."""
        return _array(self.talk_log_probs) - _array(self.base_log_probs)


def thoughts_text(view: TextThoughts, limit: int = 5) -> Group:
    """A text whose tokens are blue where the thought helped and brown where it hurt, to print with rich.

    Under the text stand a legend, a line that sums it up, and a table of the extremes.

    Args:
      view: N tokens.
      limit: how many tokens of the largest gain the table shows, and how many of the largest loss.

    Raises:
      ValueError: limit is negative.
    """
    if limit < 0:
        raise ValueError(f"limit = {limit}: must be at least 0")
    gains = view.gains
    scale = robust_scale(gains)
    text = Text()
    for token, gain in zip(view.tokens, gains.tolist(), strict=True):
        text.append(shown(token), gain_style(None if gain is None else gain / scale))
    if view.tokens[-1].endswith("\n"):
        text.right_crop(1)  # an empty line follows anyway
    parts: list[Text | Table] = [text, _legend(scale), Text(summary(view) + "\n")]
    extremes = _extremes(view, limit)
    return Group(*parts, *([extremes] if extremes.row_count else []))


def thoughts_html(view: TextThoughts, title: str) -> str:
    """The text as an HTML page that needs no other file: colours, and each token's numbers and thought on a click.

    `#token=12` after the page's address opens it with token 12 chosen; `&by=entropy` or `&by=weight` sets the colour.
    """
    numbers = {
        "base": view.base_log_probs,
        "talk": view.talk_log_probs,
        "weight": view.weights,
        "entropy": view.entropies,
    }
    arrays = {name: _array(values) for name, values in numbers.items()}
    scales = {"gain": robust_scale(view.gains)} | {name: robust_scale(arrays[name]) for name in ("entropy", "weight")}
    data: dict[str, Any] = {name: _json_numbers(values) for name, values in arrays.items()}
    data["thoughts"] = [[visible(piece) for piece in pieces] for pieces in _pieces(view)]
    data["scales"] = scales
    spans = "".join(
        f'<span data-n="{n}" role="button" tabindex="{-1 if n else 0}">{html.escape(shown(token))}</span>'
        for n, token in enumerate(view.tokens)
    )
    fields = {
        "title": html.escape(visible(title)),
        "summary": html.escape(summary(view)),
        "legends": _html_legends(scales, bool((arrays["weight"].compressed() < 0).any())),
        "text": spans,
        # With every < spelt out, nothing in the data can end the script element or open a comment.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = resources.files("mod_star.views").joinpath(TEMPLATE).read_text(encoding="utf-8")
    # In one pass: what is put in may itself hold braces.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)


def robust_scale(values_N: Floats) -> float:
    """The size that gets the full colour: a high percentile of the |values| there are, never next to nothing."""
    sizes = np.abs(_array(values_N).compressed())
    return max(LEAST_SCALE, float(np.percentile(sizes, PERCENTILE))) if sizes.size else LEAST_SCALE


def gain_style(share: float | None) -> Style:
    """Style of a token whose gain is `share` of the scale, within [-1, 1] or cut to it; dim if there is none."""
    if share is None:
        return Style(dim=True)
    size = min(1.0, abs(share))
    if size <= NEUTRAL:
        return Style()
    weak, full = HELPED if share > 0 else HURT
    paper = (round(a + size * (b - a)) for a, b in zip(weak, full, strict=True))
    return Style(color=Color.from_rgb(255, 255, 255), bgcolor=Color.from_rgb(*paper))


def shown(token: str) -> str:
    """What stands for a token in the text: visible, a newline shown and done, ∅ for a token that adds nothing."""
    return "".join(visible(c) + ("\n" if c == "\n" else "") for c in token) or "∅"


def summary(view: TextThoughts) -> str:
    """One line of numbers about all tokens that have a thought."""
    gains = view.gains
    thought = ~np.ma.getmaskarray(gains)
    count = int(thought.sum())
    if count == 0:
        return f"No thought before any of the {len(gains)} tokens"
    base, talk = (-_array(values)[thought].mean() for values in (view.base_log_probs, view.talk_log_probs))
    return (
        f"Mean gain {_signed(gains[thought].mean())} nats/token · {np.mean(gains[thought] > 0):.0%} of {count:,} tokens"
        f" helped · {base:.3f} nats/token without thoughts, {talk:.3f} with"
    )


def _legend(scale: float) -> Text:
    legend = Text("\ngain ")
    for share in (-1, -0.5, 0, 0.5, 1):
        legend.append(f" {_signed(share * scale)} ", gain_style(share))
        legend.append(" ")
    legend.append(f"nats. Brown: the thought hurt, blue: it helped; full colour from {scale:.3g} on")
    legend.append(f" ({PERCENTILE}th percentile of |gain|). ")
    legend.append("Dim", gain_style(None))
    return legend.append(": no thought.\n")


def _extremes(view: TextThoughts, limit: int) -> Table:
    """A row for each of the `limit` largest gains, then of the largest losses; the worst one last."""
    gains = view.gains
    there = np.flatnonzero(~np.ma.getmaskarray(gains))
    order = [int(n) for n in there[np.argsort(-gains.compressed(), kind="stable")]]
    helped = [n for n in order if gains[n] > 0][:limit]
    hurt = [n for n in order if gains[n] < 0][-limit:] if limit else []
    base, talk, weights, entropies = (
        _array(values) for values in (view.base_log_probs, view.talk_log_probs, view.weights, view.entropies)
    )
    rows = [
        (
            visible(view.tokens[n]).replace(" ", "␣") or "∅",
            _shortened(visible(view.thoughts[n])),
            f"{_percent(base[n])} → {_percent(talk[n])}",
            f"{gains[n]:+.3f}".replace("-", "−"),
            None if weights[n] is np.ma.masked else f"{weights[n]:.3f}".replace("-", "−"),
            None if entropies[n] is np.ma.masked else f"{entropies[n]:.2f}",
        )
        for n in helped + hurt
    ]
    title = "The thoughts that helped most, and those that hurt most"
    table = result_table(title, ("token", "thought before it", "probability", "gain", "w", "entropy"), rows)
    table.columns[1].justify = "left"
    if helped and hurt:
        table.rows[len(helped) - 1].end_section = True
    return table


def _html_legends(scales: dict[str, float], negative_weights: bool) -> str:
    """A bar of the scale for each colouring; the page shows one at a time."""
    end = f"full colour: {PERCENTILE}th percentile of |gain|"
    meanings = {
        "gain": (f"nats · brown: the thought hurt, blue: it helped · {end}", True),
        "entropy": ("nats · how unsure the model was without a thought", False),
        "weight": ("mixing weight of the prediction after the thought", negative_weights),
    }
    legends = []
    for by, (meaning, two_sided) in meanings.items():
        shares = (-1.0, -0.5, 0.0, 0.5, 1.0) if two_sided else (0.0, 0.5, 1.0)
        number = _signed if two_sided else "{:.3g}".format
        ticks = "".join(f"<span>{number(share * scales[by])}</span>" for share in shares)
        sides = "both" if two_sided else "one"
        legends.append(
            f'<div class="legend {sides}" data-by="{by}"><div class="bar"></div><div class="ticks">{ticks}</div>'
            f"<p>{meaning}</p></div>"
        )
    return "\n".join(legends)


def _pieces(view: TextThoughts) -> list[list[str]]:
    """Each thought in pieces; as one piece if only its text is known."""
    pairs = zip(view.thoughts, view.thought_tokens, strict=True)
    return [pieces or ([thought] if thought else []) for thought, pieces in pairs]


def _array(values: Floats) -> Numbers:
    """Masked where there is none."""
    if isinstance(values, np.ma.MaskedArray):
        return values
    entries = np.asarray(values, object)
    absent = np.array([entry is None for entry in entries.ravel()], bool).reshape(entries.shape)
    return np.ma.array(np.where(absent, 0.0, entries).astype(np.float64), mask=absent)


def _json_numbers(values: Numbers) -> list[float | None]:
    """With six decimals."""
    return [None if value is None else round(value, 6) for value in values.tolist()]


def _signed(value: float) -> str:
    """Three significant digits at most, with a sign: "+0.031", "−1.2"; "0" if it is that."""
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def _percent(log_prob: float) -> str:
    """Of a log-probability: "12.3%", "0.0041%"."""
    share = 100 * float(np.exp(log_prob))
    return f"{share:.1f}%" if share >= 1 else f"{share:.2g}%"


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"

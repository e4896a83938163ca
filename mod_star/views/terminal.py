"""What the command line and the experiments show: tables, and text coloured by how much was computed for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich import box
from rich.color import Color
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

Cell = str | int | float | None

# From little to much: viridis, whose hue and brightness both rise. Ink and paper are both set, so that it reads on
# light terminals and on dark ones.
RAMP = ((62, 74, 137), (38, 130, 142), (53, 183, 121), (253, 231, 37))


def visible(text: str) -> str:
    """The text with newlines and tabs as signs, and every other control character (escape sequences too) as ·."""
    signs = {"\n": "↵", "\r": "↵", "\t": "→"}
    return "".join(signs.get(c, c if c.isprintable() else "·") for c in text)


def result_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """A table to print with rich: first column to the left, the others to the right.

    Args:
      title: a line above it; may be empty.
      columns: headings.
      rows: per row a cell for each column. Strings stand as they are; integers get thousands separators, floats four
        digits; None, a value that there is not, is a dash.

    Raises:
      ValueError: a row has another number of cells than there are columns.
    """
    table = Table(title=Text(title, style="bold") if title else None, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if index else "left", style="" if index else "bold")
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells, but there are {len(columns)} columns: {row!r}")
        table.add_row(*(Text(_format(cell)) for cell in row))
    return table


def routes_text(tokens: Sequence[str], routed_LxN: npt.ArrayLike, block_names: Sequence[str]) -> Group:
    """A text whose tokens are the brighter the more routed blocks computed them, to print with rich.

    Under the text stand a legend and, for each block, the share of the tokens that it computed.

    Args:
      tokens: N pieces of text; joined they are the text.
      routed_LxN: bool; [l, n] is True if routed block l computed token n.
      block_names: L names.

    Raises:
      ValueError: the shapes don't fit.
    """
    routed = check_routes(tokens, routed_LxN, block_names)
    L, N = routed.shape
    text = Text()
    for token, count in zip(tokens, routed.sum(axis=0), strict=True):
        # A newline is shown and done, so that the text keeps its lines.
        text.append(visible(token).replace("↵", "↵\n") if "\n" in token else visible(token), _shade(int(count), L))
    legend = Text("\ncomputed by ")
    for count in sorted({round(share * L) for share in (0, 0.25, 0.5, 0.75, 1)}):
        legend.append(f" {count} ", _shade(count, L))
        legend.append(" ")
    legend.append(f"of {L} routed blocks\n")
    width = max(len(name) for name in block_names)
    shares = Text()
    for name, row in zip(block_names, routed, strict=True):
        count = int(row.sum())
        share = count / max(1, N)
        shares.append(f"{name:{width}}  ", "bold")
        shares.append("█" * round(30 * share), "blue")
        shares.append("░" * (30 - round(30 * share)), "bright_black")
        shares.append(f"  {share:6.1%}   {count} of {N} tokens\n")
    shares.rstrip()
    return Group(text, legend, shares)


def check_routes(tokens: Sequence[str], routed_LxN: npt.ArrayLike, block_names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """The routing as a NumPy bool array LxN, L >= 1, N >= 1. Raises ValueError if it doesn't fit tokens and names."""
    routed = np.asarray(routed_LxN, dtype=bool)
    expected = (len(block_names), len(tokens))
    if routed.shape != expected or 0 in expected:
        raise ValueError(
            f"routed has shape {routed.shape}, but there are (blocks, tokens) = {expected}, at least 1 each"
        )
    return routed


def _format(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:,.4g}"


def _shade(count: int, most: int) -> Style:
    """Style of a token that `count` of `most` blocks computed."""
    if count == 0:
        return Style(dim=True)
    place = (len(RAMP) - 1) * ((count - 1) / (most - 1) if most > 1 else 0.5)
    low = min(int(place), len(RAMP) - 2)
    mixed = tuple(round(a + (place - low) * (b - a)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))
    ink = Color.from_rgb(255, 255, 255) if place < 1.3 else Color.from_rgb(0, 0, 0)
    return Style(color=ink, bgcolor=Color.from_rgb(*mixed))

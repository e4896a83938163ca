"""What the experiments share: a mean with its spread, tables in Markdown, and files written whole or not at all."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mod_star.atomic_files import write_atomically
from mod_star.views.terminal import result_table


def spread(values: list[float], form: str) -> str:
    """Mean ± sample standard deviation; the number alone if there is one value, or all are the same."""
    mean = form.format(statistics.mean(values))
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {form.replace('+', '').format(statistics.stdev(values))}"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    rule = ["---", *["--:"] * (len(columns) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [columns, rule, *rows])


Table = tuple[str, list[str], list[list[str]]]
"""Title, columns, rows."""


def show_tables(tables: Sequence[Table], path: Path, console: Console) -> None:
    """Prints tables, and writes them into a file in Markdown."""
    text = ""
    for title, head, body in tables:
        console.print(f"\n{title}", style="bold")
        console.print(result_table("", head, body))
        text += f"{title}:\n\n{markdown(head, body)}\n"
    path.write_text(text, encoding="utf-8")


def write_aside(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, in a directory that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)

"""What the experiments share: a mean with its spread, tables in Markdown, and files written whole or not at all."""

from __future__ import annotations

import statistics
from pathlib import Path

from mod_star.atomic_files import write_atomically


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


def write_aside(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, in a directory that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)

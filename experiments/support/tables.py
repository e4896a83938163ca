"""The tables of an experiment's README as data, which is what its results.json holds.

    python -m experiments.support.tables    # writes every results.json anew

The README is what people edit; `tests/experiments/test_folders.py` holds results.json to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
_NUMBER = r"[+-]?[\d,]+(?:\.\d+)?(?:e[+-]?\d+)?"
_CELL = re.compile(
    rf"(?P<value>{_NUMBER})\s*(?P<unit>%|M)?"
    rf"(?:\s*±\s*(?P<spread>{_NUMBER})\s*%?|\s*\((?P<low>{_NUMBER}) to (?P<high>{_NUMBER})\))?"
)


def read_cell(text: str) -> dict[str, Any] | str | None:
    """What a cell says: a value with its unit, and its spread or interval; other text as it is; None if it is empty."""
    text = text.strip().replace("−", "-")
    if text in ("", "–"):
        return None
    match = _CELL.fullmatch(text)
    if match is None:
        return text
    unit = {} if match["unit"] is None else {"unit": match["unit"]}
    numbers = {key: float(match[key].replace(",", "")) for key in ("value", "spread", "low", "high") if match[key]}
    return numbers | unit


def read_tables(text: str) -> list[dict[str, dict[str, Any]]]:
    """The tables of a Markdown text: what each row says in each column, by the names of both; empty cells left out."""
    tables = []
    for match in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE):
        (_, *columns), _, *rows = (_cells(line) for line in match.group(0).splitlines())
        tables.append({name: dict(_measured(columns, cells)) for name, *cells in rows})
    return tables


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def _measured(columns: list[str], cells: list[str]) -> Iterator[tuple[str, Any]]:
    for column, cell in zip(columns, cells, strict=True):
        if (value := read_cell(cell)) is not None:
            yield column, value


def results(folder: Path) -> str:
    """The text of results.json that belongs to the README of an experiment's folder."""
    tables = read_tables((folder / "README.md").read_text(encoding="utf-8"))
    return json.dumps(tables, indent=1, ensure_ascii=False) + "\n"


def folders() -> list[Path]:
    """The folders of the experiments."""
    return sorted(path.parent for path in HERE.glob("*/run.py"))


if __name__ == "__main__":
    for experiment in folders():
        (experiment / "results.json").write_text(results(experiment), encoding="utf-8")

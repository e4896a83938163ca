"""Each experiment is a folder that says what it claims, how to run it, on what, and what came out, numbers included."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.support.tables import folders, read_cell, read_tables, results

ROOT = Path(__file__).parents[2]
FOLDERS = folders()
SAID = ("**Claim", "**Command.**", "**Data.**", "**Machine and hours.**", "## Result", "## Controls")


def test_there_are_experiments() -> None:
    assert len(FOLDERS) >= 7


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_says_what_it_is(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert [part for part in SAID if part not in text] == []
    assert f"python -m experiments.{folder.name}\n" in text or f"python -m experiments.{folder.name} --" in text
    assert ("](figure.png)" in text) != ("There is no figure." in text)
    assert (folder / "figure.png").is_file() == ("](figure.png)" in text)
    assert importlib.util.find_spec(f"experiments.{folder.name}.__main__") is not None
    assert (folder / "report.py").is_file()
    page = ROOT / f"docs/results/{folder.name}.md"
    assert f"{{include}} ../../experiments/{folder.name}/README.md" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_results_are_those_of_the_readme(folder: Path) -> None:
    stored = (folder / "results.json").read_text(encoding="utf-8")
    assert json.loads(stored), "no table"
    assert stored == results(folder), "run python -m experiments.support.tables"


def test_cells() -> None:
    assert read_cell("3.2722 ± 0.0476") == {"value": 3.2722, "spread": 0.0476}
    assert read_cell("20.2% ± 1.7%") == {"value": 20.2, "unit": "%", "spread": 1.7}
    assert read_cell("3.0 (1.4 to 6.4)") == {"value": 3.0, "low": 1.4, "high": 6.4}
    assert read_cell("−0.071") == {"value": -0.071}
    assert read_cell("1,617") == {"value": 1617.0}
    assert read_cell("–") is None
    assert read_cell("1.8644 (1.8672 without thoughts)") == "1.8644 (1.8672 without thoughts)"


def test_tables() -> None:
    text = "words\n\n| | a | b |\n|---|--:|--:|\n| one | 1 | |\n| two | 2 | 3 |\n\nwords\n"
    assert read_tables(text) == [{"one": {"a": {"value": 1}}, "two": {"a": {"value": 2}, "b": {"value": 3}}}]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_nothing_is_kept_outside_of_the_repository(folder: Path) -> None:
    for file in folder.glob("*.py"):
        for path in re.findall(r"Path\(\"([^\"]*)\"\)", file.read_text(encoding="utf-8")):
            assert not path.startswith(("/", "~", "..")), f"{file}: {path}"


def test_experiments_import_one_another_in_one_direction() -> None:
    """Each module in a fresh interpreter, so that a circle would show whichever module comes first."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in FOLDERS
        for path in folder.glob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    ]
    program = "import importlib, sys\n"
    program += "for name in sys.argv[1:]:\n"
    program += "    importlib.import_module(name)\n"
    program += "    for other in [key for key in sys.modules if key.startswith('experiments')]:\n"
    program += "        del sys.modules[other]\n"
    subprocess.run([sys.executable, "-c", program, *modules], check=True, cwd=ROOT, timeout=120)

"""What the documentation names is there: functions, tests, pages, pictures, commands and their options."""

import importlib
import re
import runpy
from pathlib import Path

import pytest

from mod_star.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("experiments/*/README.md")})
GENERATED = {"configuration", "command_line"}  # of docs/reference, by docs/_ext


def rows_of_paper_index() -> list[list[str]]:
    text = (ROOT / "docs/reference/paper_index.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    return [row for row in rows if "::" in row[2]]


def test_every_function_and_test_of_the_paper_index_exists() -> None:
    rows = rows_of_paper_index()
    assert len(rows) >= 25
    for _, function, test, _ in rows:
        module, _, name = function.strip("`").rpartition(".")
        try:
            assert hasattr(importlib.import_module(f"mod_star.{module}"), name), function
        except ModuleNotFoundError:
            pytest.fail(f"{function}: there is no module mod_star.{module}")
        file, _, test_name = test.strip("`").partition("::")
        assert re.search(rf"^def {test_name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.M), test


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" in target or Path(target).stem in GENERATED:
            continue
        assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_commands_and_modules_that_pages_name_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    commands = set(re.findall(r"(?:^|[`' ])mod-star ([a-z]+)\b", text, re.M))
    assert {"train", "sample", "plan", "evaluate", "harness"} <= commands <= set(COMMANDS)
    modules = set(re.findall(r"python -m (experiments[\w.]+)", text))
    assert len(modules) >= 8
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_readme_is_short_and_names_its_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert any("make demo" in line for line in lines)
    assert any("make test" in line for line in lines)


def test_the_glossary_has_each_word_once_in_order() -> None:
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^(\S.*)\n  \S", text.partition(":::{glossary}\n")[2], re.MULTILINE)
    assert len(words) >= 40
    assert words == sorted(set(words), key=str.lower)


def test_pictures_of_the_architecture_name_modules_that_exist() -> None:
    draw = runpy.run_path(str(ROOT / "docs/images/draw.py"))
    for name, (title, stages) in draw["PICTURES"].items():
        stored = (ROOT / f"docs/images/{name}.svg").read_text(encoding="utf-8")
        assert stored == draw["picture"](title, stages), "run python docs/images/draw.py"
        for module in (module for stage in stages for module in stage.modules.split()):
            assert (ROOT / "mod_star" / module).is_file(), f"{name}: {module}"

"""Writes the pages of docs/reference that come from the code: every field of a run, every command's help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from mod_star.cli import COMMANDS
from mod_star.config import MeshConfig, ProcessesConfig, RunConfig
from mod_star.config_checks import field_ranges

REFERENCE = Path(__file__).parents[1] / "reference"
DEVICES = {"mesh": MeshConfig, "processes": ProcessesConfig}
"""Groups of fields that are not a run's."""

HELP_OF_ALL = """
import contextlib, io, json, sys
from mod_star.cli import main
texts = {}
for name in sys.argv[1:]:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # frames are drawn in its characters
    with contextlib.redirect_stdout(out):
        try:
            main([name, "--help"])
        except SystemExit as end:
            if end.code:
                raise
    out.flush()
    texts[name] = out.buffer.getvalue().decode()
print(json.dumps(texts))
"""
"""Prints what commands print with `--help`, by name."""


def field_help(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, which is also the help of its option."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            texts[statement.target.id] = " ".join(str(following.value.value).split())
    return texts


def type_without_range(text: str) -> str:
    """A field's type as it is written in the code, `int` for `Annotated[int, at_least(1)]`."""
    tree = ast.parse(text, mode="eval").body
    if not (isinstance(tree, ast.Subscript) and ast.unparse(tree.value) == "Annotated"):
        return text
    assert isinstance(tree.slice, ast.Tuple)
    return str(ast.get_source_segment(text, tree.slice.elts[0]))


def configuration_page() -> str:
    """One section per group of fields: option, type, range, default, meaning."""
    lines = ["# Configuration", "", "Every field of a run, generated from `mod_star.config`. A field is the option of"]
    lines += ["`mod-star train` by the same name, with hyphens: `train.batch_size` is `--train.batch-size`.", ""]
    defaults = RunConfig()
    plain = []
    for field in dataclasses.fields(RunConfig):
        group = type(getattr(defaults, field.name))
        if dataclasses.is_dataclass(group):
            lines += _section(field.name, group)
        else:
            plain.append(field.name)
    lines += ["## The run itself", "", *_table(RunConfig, plain, "")]
    lines += ["## Devices and processes", "", "Options of the commands that use several devices. They are not part of"]
    lines += ["a run, which may go on with others.", ""]
    for name, group in DEVICES.items():
        lines += ["#" + line if line.startswith("#") else line for line in _section(name, group)]
    return "\n".join(lines) + "\n"


def _section(name: str, group: type) -> list[str]:
    fields = [field.name for field in dataclasses.fields(group)]
    return [f"## {name}", "", str(inspect.getdoc(group)), "", *_table(group, fields, f"{name}.")]


def _table(group: type, names: list[str], prefix: str) -> list[str]:
    texts, ranges, defaults = field_help(group), field_ranges(group), group()
    types = {field.name: type_without_range(str(field.type)) for field in dataclasses.fields(group)}
    rows = ["| field | type | range | default | meaning |", "|---|---|---|---|---|"]
    for name in names:
        type_text = types[name].replace("|", "\\|")
        default: Any = getattr(defaults, name)
        meaning = texts[name].replace("|", "\\|").replace("<", "\\<")
        allowed = ranges[name].text if name in ranges else ""
        rows.append(f"| `{prefix}{name}` | `{type_text}` | {allowed} | `{default!r}` | {meaning} |")
    return [*rows, ""]


def commands_page() -> str:
    """What `mod-star COMMAND --help` prints, command by command."""
    lines = ["# Command line", "", "What `mod-star COMMAND --help` prints. Exit codes: 0 done; 1 training failed, or"]
    lines += ["something that is needed is not available now; 2 bad input; 130 Ctrl-C; 143 SIGTERM.", ""]
    names = [name for name in COMMANDS if name != "harness"]  # its help is lm_eval's, which is an optional package
    # One process for all of them: most of the time of each would be its imports.
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, *names],
        env=os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
    )
    for name, text in json.loads(done.stdout).items():
        summary = f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}."
        lines += [f"## mod-star {name}", "", summary, "", "```text", text.rstrip(), "```", ""]
    return "\n".join(lines) + "\n"


def write_pages(app: Sphinx) -> None:
    """Writes them where they have changed, so that a second build is quick."""
    del app
    for name, text in (("configuration", configuration_page()), ("command_line", commands_page())):
        page = REFERENCE / f"{name}.md"
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx calls it."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}

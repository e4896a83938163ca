"""The page of all fields, which docs/_ext writes from the code."""

from __future__ import annotations

import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from mod_star.config import MeshConfig, ProcessesConfig, RunConfig

pytest.importorskip("sphinx")
sys.path.append(str(Path(__file__).parents[2] / "docs" / "_ext"))


def test_every_field_has_a_row_with_type_range_and_default() -> None:
    from generated_reference import configuration_page  # type: ignore[import-not-found]

    page = configuration_page()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", page, re.MULTILINE))
    groups = {field.name: getattr(RunConfig(), field.name) for field in fields(RunConfig)}
    groups |= {"mesh": MeshConfig(), "processes": ProcessesConfig()}
    names = []
    for name, group in groups.items():
        names += [f"{name}.{field.name}" for field in fields(group)] if is_dataclass(group) else [name]
    assert sorted(rows) == sorted(names)
    assert "Annotated" not in page
    assert rows["model.kv_heads"].startswith(r"`int \| None` | at least 1 | `None` | Key/value heads")
    assert rows["routing.capacity"].startswith("`float` | in (0, 1] | `0.125` | Share of")
    assert rows["model.scan"].startswith("`bool` |  | `True` | Scan over")
    assert rows["data.weights"].startswith("`tuple[float, ...]` | above 0 | `()` | Share of each source")
    assert rows["init_from"].startswith(r"`str \| None` |  | `None` | Directory")

"""Keeps docstrings of fields, properties and types: napoleon would take what stands before a colon for a type."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

_kept: dict[str, list[str]] = {}


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx calls it."""

    def keep(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        del app, obj, options
        if what in ("attribute", "property", "data"):
            _kept[name] = list(lines)

    def restore(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        del app, obj, options
        if what in ("attribute", "property", "data"):
            lines[:] = _kept.pop(name)

    app.connect("autodoc-process-docstring", keep, priority=400)  # napoleon's is 500
    app.connect("autodoc-process-docstring", restore, priority=600)
    return {"parallel_read_safe": True}

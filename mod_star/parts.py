"""Loads a user's own `Parts` (router, gate, selection, feed-forward, block, ...) from a Python file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mod_star.errors import InputError
from mod_star.model.parts import DEFAULT_PARTS, Part, Parts

__all__ = ["DEFAULT_PARTS", "Part", "Parts", "load_parts"]


def load_parts(reference: str | None) -> Parts:
    """Imports `FILE.py:NAME`, a `Parts` in a user's file; None gives the built-in ones.

    The file is executed: name only files you trust.

    Raises:
      InputError: the reference is malformed, the file is missing or fails, or the name is not a `Parts`.
    """
    if reference is None:
        return DEFAULT_PARTS
    path, _, name = reference.rpartition(":")
    if not path.endswith(".py") or not name:
        raise InputError(f"parts = {reference!r}: must be FILE.py:NAME, the name of a mod_star.Parts in a Python file")
    if not Path(path).is_file():
        raise InputError(f"parts = {reference!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location("mod_star_user_parts", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        raise InputError(f"parts = {reference!r}: {path} fails with {type(error).__name__}: {said}") from error
    parts = getattr(module, name, None)
    if not isinstance(parts, Parts):
        raise InputError(f"parts = {reference!r}: {name} must be a mod_star.Parts, found {type(parts).__name__}")
    return parts

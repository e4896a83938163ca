"""The doors of the network and of training: `Parts`, which `--parts FILE.py:NAME` loads from a user's file.

A `Parts` replaces any of router, gate, feed-forward layer, block, selection, causal rule and auxiliary loss; objective
and optimizer; reward, thought, mixing and where to think. docs/how-to/extend.md lists them with examples.
"""

from __future__ import annotations

from mod_star.errors import InputError
from mod_star.model.parts import DEFAULT_PARTS, Part, Parts
from mod_star.user_code import load_from_file

__all__ = ["DEFAULT_PARTS", "Part", "Parts", "load_parts"]


def load_parts(reference: str | None) -> Parts:
    """Imports `FILE.py:NAME`, a `Parts` in a user's file; None gives the built-in ones.

    The file is executed: name only files you trust.

    Raises:
      InputError: the reference is malformed, the file is missing or fails, or the name is not a `Parts`.
    """
    if reference is None:
        return DEFAULT_PARTS
    parts = load_from_file(reference, "parts", "the name of a mod_star.Parts in a Python file")
    if not isinstance(parts, Parts):
        name = reference.rpartition(":")[2]
        raise InputError(f"parts = {reference!r}: {name} must be a mod_star.Parts, not {type(parts).__name__}")
    return parts

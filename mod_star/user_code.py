"""Loads a user's function or object that is named FILE.py:NAME."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mod_star.errors import InputError


def load_from_file(reference: str, option: str, what: str) -> Any:
    """What NAME is in FILE.py, None if it is nothing there. The file is executed: name only files you trust.

    Args:
      reference: FILE.py:NAME.
      option: what the user calls it.
      what: the thing expected, for the error message, such as "the name of a mod_star.Parts in a Python file".

    Raises:
      InputError: the reference is malformed, the file is missing, or it fails.
    """
    path, _, name = reference.rpartition(":")
    if not path.endswith(".py") or not name:
        raise InputError(f"{option} = {reference!r}: must be FILE.py:NAME, {what}")
    if not Path(path).is_file():
        raise InputError(f"{option} = {reference!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"mod_star_user_{option.strip('-').replace('-', '_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{option} = {reference!r}: {path} fails with {type(error).__name__}: {said}") from error
    return getattr(module, name, None)

"""Files that are written as a whole or not at all: first beside their place, then moved into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

UNFINISHED = ".new"
"""Ends the names of files that are being written."""


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Writes a file beside its place and moves it there; what was there before stays until then.

    Args:
      path: the file; its directory must exist.
      content: text (UTF-8, line ends as they are on this system), bytes, or a function that writes the file that it is
        given.

    Raises:
      OSError: it can't be written, or what else the function raises. What was written aside is removed.
    """
    beside = path.with_name(path.name + UNFINISHED)
    try:
        if isinstance(content, str):
            beside.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            beside.write_bytes(content)
        else:
            content(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise

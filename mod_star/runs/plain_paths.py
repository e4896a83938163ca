"""Paths for Orbax and TensorStore, which give some characters of a local path a meaning of their own.

Orbax finds the parts of a checkpoint with a pattern that begins with its path, so that `runs/a[1]` stands for `runs/a1`
there, and `runs/a*` for its neighbours, too. TensorStore takes a backslash for a slash, and a path must be UTF-8. Where
a path has such characters it is given a second name without them: a symbolic link in a temporary directory of this
process, gone when the process ends.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import unicodedata
from pathlib import Path

import jax

from mod_star.errors import InputError

PATTERN = "*?[\\"
"""Characters of a path that Orbax or TensorStore would not take for themselves."""
NO_LINE = ("Cc", "Cs", "Zl", "Zp")
"""Categories of characters that a line of text can't show: controls, bytes that are no UTF-8, ends of lines."""

_links: dict[Path, Path] = {}


def plain_path(directory: Path) -> Path:
    """An absolute path of a local directory that Orbax and TensorStore take literally; the same one every time.

    The directory need not exist.

    Raises:
      InputError: there is no such path: a link can't be made, or several processes would need the same one.
    """
    directory = directory.absolute()
    if not (odd := odd_characters(directory)):
        return directory
    if directory not in _links:
        refused = f"{directory}: has {odd} in its path, which Orbax takes for a pattern"
        if jax.process_count() > 1:
            raise InputError(f"{refused}; several processes need a directory without")
        try:
            folder = Path(tempfile.mkdtemp(prefix="mod-star-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            link = folder / "checkpoints"
            os.symlink(directory, link)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"{refused}; a temporary link without cannot be made ({reason})") from error
        if also := odd_characters(link):
            raise InputError(f"{refused}; so has the directory of temporary files, {folder.parent} ({also})")
        _links[directory] = link
    return _links[directory]


def odd_characters(path: Path) -> str:
    """Those of a path that would not be taken literally, such as "[ *"; empty: none."""
    odd = dict.fromkeys(
        character for character in str(path) if character in PATTERN or "\ud800" <= character <= "\udfff"
    )
    return " ".join(character if character in PATTERN else "bytes that are no UTF-8" for character in odd)


def require_showable(path: Path) -> None:
    """Raises InputError if a path has characters that break the lines that name it: controls, or no UTF-8."""
    odd = [character for character in str(path) if unicodedata.category(character) in NO_LINE]
    if odd:
        named = ", ".join(dict.fromkeys(f"U+{ord(character):04X}" for character in odd))
        raise InputError(
            f"{str(path)!r}: has control characters or bytes that are no UTF-8 ({named}); choose another name"
        )

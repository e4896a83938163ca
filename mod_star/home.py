"""The user's home and cache directory, for processes that may have neither, such as those in containers."""

from __future__ import annotations

import os
import pwd
from pathlib import Path


def home() -> Path | None:
    """The user's home directory, which may not exist; None: there is none."""
    named = os.environ.get("HOME", "")
    if not named:
        try:
            named = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            return None
    return Path(named) if os.path.isabs(named) else None


def cache_root() -> Path | None:
    """Where programs keep what they can make again; None: nowhere.

    XDG_CACHE_HOME or ~/.cache. A relative XDG_CACHE_HOME doesn't count, as its specification says.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named)
    directory = home()
    return None if directory is None else directory / ".cache"


def expanded(path: str | Path) -> Path:
    """The path with ~ replaced by the home that it stands for; left as it is if that isn't known."""
    return Path(os.path.expanduser(path))
